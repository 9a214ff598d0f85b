/* Sign planes of the difference between two models, and back. */
#include "pairs.h"

enum { MOST_PLANES = 8 };

int fast_planes_supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}

typedef struct {
    int64_t rows, columns, width, groups, bytes;
    int per_group;
} Shape;

INLINE Shape shape_of(int64_t rows, int64_t columns, int64_t width, int per_group) {
    return (Shape){rows, columns, width, (columns + width - 1) / width, (columns + 7) / 8, per_group};
}

/* Planes as they are read 32 columns at a time: where a row's signs begin, and the levels of a group. */
typedef struct {
    const uint8_t *signs[MOST_PLANES];
    float level[MOST_PLANES];
    int64_t count;
} Planes;

INLINE Planes planes_at(const Shape *in, int64_t count, int64_t row, int64_t group, const float *levels,
                        const uint8_t *signs) {
    Planes to;
    to.count = count;
    for (int64_t p = 0; p < count; p++) {
        to.signs[p] = signs + (p * in->rows + row) * in->bytes;
        to.level[p] = levels[in->per_group ? (p * in->rows + row) * in->groups + group : p];
    }
    return to;
}

/* x[4] of 32 columns from m: minus each plane, or their sum. */
INLINE void planes_32(const Planes *in, int64_t m, int take, __m256 *x) {
    const __m256i up = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (int64_t p = 0; p < in->count; p++) {
        int32_t some;
        memcpy(&some, in->signs[p] + m / 8, 4);
        __m256i bits = _mm256_set1_epi32(some);
        __m256 plus = _mm256_set1_ps(take ? -in->level[p] : in->level[p]), minus = _mm256_xor_ps(plus, _mm256_set1_ps(-0.0f));
        for (int j = 0; j < 4; j++) {
            /* The bit of a column becomes the sign, which chooses. */
            __m256i own = _mm256_sllv_epi32(bits, _mm256_sub_epi32(up, _mm256_set1_epi32(8 * j)));
            x[j] = _mm256_add_ps(x[j], _mm256_blendv_ps(minus, plus, _mm256_castsi256_ps(own)));
        }
    }
}

INLINE float planes_1(const Planes *in, int64_t m, int take, float x) {
    for (int64_t p = 0; p < in->count; p++) {
        float level = take ? -in->level[p] : in->level[p];
        x += in->signs[p][m / 8] >> (m % 8) & 1 ? level : -level;
    }
    return x;
}

/* How many of a group's columns are gone through 32 at a time: none, where groups begin between bytes. */
INLINE int64_t by_32(const Shape *in, int64_t from, int64_t to) {
    return in->groups > 1 && in->width % 32 ? 0 : (to - from) / 32 * 32;
}

/* plane_of for columns [from, to) of a row, which are a group, `at` being where the row begins, and the first
 * `many` of them gone through 32 at a time. */
INLINE float plane_of_group(const void *variant, int v, const void *base, int b, int64_t at, int64_t from, int64_t to,
                            int64_t many, const Planes *before, uint8_t *signs) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    float lane[LANES];
    int64_t m = from;
    for (; m < from + many; m += 32) {
        __m256 x[4];
        for (int j = 0; j < 4; j++) x[j] = eight_of(variant, v, base, b, at + m + 8 * j);
        planes_32(before, m, 1, x);
        for (int j = 0; j < 4; j++) {
            sum[j % 2] = _mm256_add_ps(sum[j % 2], _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x[j]));
            signs[m / 8 + j] = (uint8_t)_mm256_movemask_ps(_mm256_cmp_ps(x[j], _mm256_setzero_ps(), _CMP_GE_OQ));
        }
    }
    if (m == to) return folded_halves(sum);
    memcpy(lane, sum, sizeof lane);
    for (; m < to; m++) {
        float x = planes_1(before, m, 1, one_of(variant, v, base, b, at + m));
        lane[(m - from) % LANES] += fabsf(x);
        if (m % 8 == 0) signs[m / 8] = 0;
        signs[m / 8] |= (uint8_t)((x >= 0) << (m % 8));
    }
    return folded(lane);
}

/* lane[LANES] plus squares of what planes miss in columns [from, to) of a row, the part of a group in a chunk. */
INLINE void missed_of_group(const void *variant, int v, const void *base, int b, int64_t at, int64_t from, int64_t to,
                            int64_t many, const Planes *in, float *lane) {
    __m256 sum[2];
    int64_t m = from;
    memcpy(sum, lane, sizeof sum);
    for (; m < from + many; m += 32) {
        __m256 x[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        planes_32(in, m, 0, x);
        for (int j = 0; j < 4; j++) {
            x[j] = _mm256_sub_ps(eight_of(variant, v, base, b, at + m + 8 * j), x[j]);
            sum[j % 2] = _mm256_add_ps(sum[j % 2], _mm256_mul_ps(x[j], x[j]));
        }
    }
    memcpy(lane, sum, sizeof sum);
    for (; m < to; m++) {
        float x = one_of(variant, v, base, b, at + m) - planes_1(in, m, 0, 0);
        lane[m % LANES] += x * x;
    }
}

/* The plane behind `plane` others: of what they leave of the difference the sums of magnitudes,
 * sums[rows * groups], and the signs, signs[plane][rows][bytes]; a zero is plus. */
void plane_of(const Pair *pair, int64_t width, int64_t plane, const float *levels, int per_group, uint8_t *signs,
              float *sums) {
    Shape in = shape_of(pair->rows, pair->columns, width, per_group);
    for (int64_t row = 0; row < in.rows; row++) {
        uint8_t *own = signs + (plane * in.rows + row) * in.bytes;
        for (int64_t g = 0; g < in.groups; g++) {
            int64_t from = g * width, to = from + width < in.columns ? from + width : in.columns;
            Planes before = planes_at(&in, plane, row, g, levels, signs);
#define CALL(variant, v, base, b) \
    plane_of_group(variant, v, base, b, row * in.columns, from, to, by_32(&in, from, to), &before, own)
            *sums++ = BY_DTYPES(pair, CALL);
#undef CALL
        }
    }
}

/* Sum of squares of what planes miss of the difference. */
double planes_missed(const Pair *pair, int64_t width, int64_t planes, const float *levels, int per_group,
                     const uint8_t *signs) {
    Shape in = shape_of(pair->rows, pair->columns, width, per_group);
    double total = 0;
    for (int64_t row = 0; row < in.rows; row++)
        for (int64_t chunk = 0; chunk < in.columns; chunk += CHUNK) {
            int64_t end = chunk + CHUNK < in.columns ? chunk + CHUNK : in.columns;
            float lane[LANES] = {0};
            for (int64_t from = chunk, to; from < end; from = to) {
                int64_t g = from / width;
                to = (g + 1) * width < end ? (g + 1) * width : end;
                Planes all = planes_at(&in, planes, row, g, levels, signs);
#define CALL(variant, v, base, b) \
    missed_of_group(variant, v, base, b, row * in.columns, from, to, by_32(&in, from, to), &all, lane)
                BY_DTYPES(pair, CALL);
#undef CALL
            }
            total += folded(lane);
        }
    return total;
}

/* Put a plane back: x[rows][columns] += level * sign. */
void add_plane(float *x, int64_t rows, int64_t columns, int64_t width, const float *levels, int per_group,
               const uint8_t *signs) {
    Shape in = shape_of(rows, columns, width, per_group);
    for (int64_t row = 0; row < rows; row++, x += columns)
        for (int64_t g = 0; g < in.groups; g++) {
            int64_t m = g * width, to = m + width < columns ? m + width : columns, until = m + by_32(&in, m, to);
            Planes plane = planes_at(&in, 1, row, g, levels, signs);
            for (; m < until; m += 32) {
                __m256 some[4];
                for (int j = 0; j < 4; j++) some[j] = _mm256_loadu_ps(x + m + 8 * j);
                planes_32(&plane, m, 0, some);
                for (int j = 0; j < 4; j++) _mm256_storeu_ps(x + m + 8 * j, some[j]);
            }
            for (; m < to; m++) x[m] = planes_1(&plane, m, 0, x[m]);
        }
}
