/* The inner loops of packing: differences, sums of magnitudes, sign planes.
 *
 * Results are the same bits as those of the portable code in `fast.py`: every sum runs over LANES
 * accumulators in column order, which are then folded in halves, and products are not contracted.
 * Functions work on one thread; a packing run has a thread a tensor.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16 };
enum { F32 = 0, F16 = 1, BF16 = 2 };

int fast_supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Eight numbers of a dtype as float32. */
static inline __m256 eight(const void *from, int dtype, int64_t at) {
    if (dtype == F32) return _mm256_loadu_ps((const float *)from + at);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + at));
    if (dtype == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static inline float one(const void *from, int dtype, int64_t at) {
    if (dtype == F32) return ((const float *)from)[at];
    uint16_t half = ((const uint16_t *)from)[at];
    return dtype == F16 ? _cvtsh_ss(half) : from_bf16(half);
}

/* out = variant - base; a null base counts as zero. */
void difference(const void *base, int base_dtype, const void *variant, int variant_dtype, float *out,
                int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256 b = base ? eight(base, base_dtype, i) : _mm256_setzero_ps();
        _mm256_storeu_ps(out + i, _mm256_sub_ps(eight(variant, variant_dtype, i), b));
    }
    for (; i < count; i++) out[i] = one(variant, variant_dtype, i) - (base ? one(base, base_dtype, i) : 0);
}

static inline float folded(const float *lane) {
    float v[LANES];
    memcpy(v, lane, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) v[j] += v[j + half];
    return v[0];
}

static float sum_of(const float *x, int64_t width) {
    float lane[LANES] = {0};
    int64_t m = 0;
    for (; m + LANES <= width; m += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += fabsf(x[m + j]);
    for (int j = 0; m < width; m++, j++) lane[j] += fabsf(x[m]);
    return folded(lane);
}

/* sums[n][g] = sum of |x| over the columns of group g of row n. */
void magnitude_sums(const float *x, int64_t rows, int64_t columns, int64_t width, float *sums) {
    int64_t groups = (columns + width - 1) / width;
    for (int64_t n = 0; n < rows; n++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t first = g * width, left = columns - first;
            sums[n * groups + g] = sum_of(x + n * columns + first, left < width ? left : width);
        }
}

/* Take a plane off: signs[n][ceil(M/8)] of x (zero is plus), x -= level * sign.
 * levels: [rows * groups] where per_row, else a single one. */
void take_plane(float *x, int64_t rows, int64_t columns, int64_t width, const float *levels, int per_row,
                uint8_t *signs) {
    int64_t groups = (columns + width - 1) / width, bytes = (columns + 7) / 8;
    for (int64_t n = 0; n < rows; n++) {
        float *row = x + n * columns;
        uint8_t *out = signs + n * bytes;
        memset(out, 0, bytes);
        int64_t m = 0;
        for (; m + 8 <= columns; m += 8) {
            int mask = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(row + m), _mm256_setzero_ps(), _CMP_GE_OQ));
            out[m / 8] = (uint8_t)mask;
        }
        for (; m < columns; m++)
            if (row[m] >= 0) out[m / 8] |= (uint8_t)(1u << (m % 8));
        for (int64_t g = 0; g < groups; g++) {
            float level = per_row ? levels[n * groups + g] : levels[0];
            int64_t last = (g + 1) * width < columns ? (g + 1) * width : columns;
            for (int64_t k = g * width; k < last; k++) row[k] -= row[k] >= 0 ? level : -level;
        }
    }
}

/* Put a plane back: x += level * sign. */
void add_plane(float *x, int64_t rows, int64_t columns, int64_t width, const float *levels, int per_row,
               const uint8_t *signs) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256 minus = _mm256_set1_ps(-0.0f);
    int64_t groups = (columns + width - 1) / width, bytes = (columns + 7) / 8;
    for (int64_t n = 0; n < rows; n++) {
        float *row = x + n * columns;
        const uint8_t *own = signs + n * bytes;
        for (int64_t g = 0; g < groups; g++) {
            float level = per_row ? levels[n * groups + g] : levels[0];
            int64_t m = g * width, last = (g + 1) * width < columns ? (g + 1) * width : columns;
            for (; m < last && m % 8; m++) row[m] += own[m / 8] >> (m % 8) & 1 ? level : -level;
            for (; m + 8 <= last; m += 8) {
                __m256i set = _mm256_and_si256(_mm256_set1_epi32(own[m / 8]), bit);
                __m256 clear = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, _mm256_setzero_si256()));
                __m256 value = _mm256_xor_ps(_mm256_set1_ps(level), _mm256_and_ps(clear, minus));
                _mm256_storeu_ps(row + m, _mm256_add_ps(_mm256_loadu_ps(row + m), value));
            }
            for (; m < last; m++) row[m] += own[m / 8] >> (m % 8) & 1 ? level : -level;
        }
    }
}

/* What is worth knowing of a difference and of what is left of it: sum |d|, sum d^2, sum r^2, max |d|,
 * entries that are not zero. `left` may be null. */
void totals(const float *d, const float *left, int64_t count, double *out) {
    double magnitude = 0, square = 0, rest = 0;
    float largest = 0;
    int64_t changed = 0;
    for (int64_t start = 0; start < count; start += 4096) {
        int64_t stop = start + 4096 < count ? start + 4096 : count;
        float a[LANES] = {0}, b[LANES] = {0}, c[LANES] = {0}, most[LANES] = {0};
        int32_t nonzero[LANES] = {0};
        int64_t i = start;
        for (; i + LANES <= stop; i += LANES)
            for (int j = 0; j < LANES; j++) {
                float v = d[i + j], m = fabsf(v);
                a[j] += m;
                b[j] += v * v;
                most[j] = m > most[j] ? m : most[j];
                nonzero[j] += v != 0;
            }
        for (int j = 0; i < stop; i++, j++) {
            float v = d[i], m = fabsf(v);
            a[j] += m;
            b[j] += v * v;
            most[j] = m > most[j] ? m : most[j];
            nonzero[j] += v != 0;
        }
        if (left) {
            for (i = start; i + LANES <= stop; i += LANES)
                for (int j = 0; j < LANES; j++) c[j] += left[i + j] * left[i + j];
            for (int j = 0; i < stop; i++, j++) c[j] += left[i] * left[i];
        }
        magnitude += folded(a);
        square += folded(b);
        rest += folded(c);
        for (int j = 0; j < LANES; j++) {
            largest = most[j] > largest ? most[j] : largest;
            changed += nonzero[j];
        }
    }
    out[0] = magnitude;
    out[1] = square;
    out[2] = rest;
    out[3] = largest;
    out[4] = (double)changed;
}

/* changed[n] = whether row n of two matrices of `bytes` bytes a row differs. */
void rows_changed(const uint8_t *a, const uint8_t *b, int64_t rows, int64_t bytes, uint8_t *changed) {
    for (int64_t n = 0; n < rows; n++) changed[n] = memcmp(a + n * bytes, b + n * bytes, bytes) != 0;
}

/* Sum of squares of numbers of a dtype. */
double square_sum(const void *x, int dtype, int64_t count) {
    double total = 0;
    for (int64_t start = 0; start < count; start += 4096) {
        int64_t stop = start + 4096 < count ? start + 4096 : count, i = start;
        __m256 sum = _mm256_setzero_ps();
        float left = 0, lane[8];
        for (; i + 8 <= stop; i += 8) {
            __m256 v = eight(x, dtype, i);
            sum = _mm256_add_ps(sum, _mm256_mul_ps(v, v));
        }
        for (; i < stop; i++) left += one(x, dtype, i) * one(x, dtype, i);
        _mm256_storeu_ps(lane, sum);
        for (int j = 0; j < 8; j++) left += lane[j];
        total += left;
    }
    return total;
}

/* Sum of squares of what planes miss of d. levels: [planes][rows * groups] where per_row, else [planes]. */
double planes_error(const float *d, int64_t rows, int64_t columns, int64_t width, int64_t planes,
                    const float *levels, int per_row, const uint8_t *signs) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256 minus = _mm256_set1_ps(-0.0f);
    int64_t groups = (columns + width - 1) / width, bytes = (columns + 7) / 8;
    double total = 0;
    for (int64_t n = 0; n < rows; n++) {
        const float *row = d + n * columns;
        for (int64_t g = 0; g < groups; g++) {
            int64_t m = g * width, last = (g + 1) * width < columns ? (g + 1) * width : columns;
            __m256 sum = _mm256_setzero_ps();
            float left = 0, lane[8];
            while (m < last) {
                int whole = m % 8 == 0 && m + 8 <= last;
                __m256 v = _mm256_setzero_ps();
                float one_sum = 0;
                for (int64_t p = 0; p < planes; p++) {
                    float level = levels[per_row ? (p * rows + n) * groups + g : p];
                    uint8_t byte = signs[(p * rows + n) * bytes + m / 8];
                    if (whole) {
                        __m256i set = _mm256_and_si256(_mm256_set1_epi32(byte), bit);
                        __m256 clear = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, _mm256_setzero_si256()));
                        v = _mm256_add_ps(v, _mm256_xor_ps(_mm256_set1_ps(level), _mm256_and_ps(clear, minus)));
                    } else {
                        one_sum += byte >> (m % 8) & 1 ? level : -level;
                    }
                }
                if (whole) {
                    v = _mm256_sub_ps(_mm256_loadu_ps(row + m), v);
                    sum = _mm256_add_ps(sum, _mm256_mul_ps(v, v));
                    m += 8;
                } else {
                    float miss = row[m] - one_sum;
                    left += miss * miss;
                    m++;
                }
            }
            _mm256_storeu_ps(lane, sum);
            for (int j = 0; j < 8; j++) left += lane[j];
            total += left;
        }
    }
    return total;
}
