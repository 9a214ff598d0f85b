/* Uniform codes of the difference between two models, and back. */
#include "pairs.h"

int fast_grid_supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}

typedef struct {
    int64_t columns, width, groups, bytes;
    float low, high;
    int bits;
} Grid;

INLINE Grid grid_of(int64_t columns, int64_t width, int bits) {
    float half = (float)(1 << (bits - 1));
    return (Grid){columns, width, (columns + width - 1) / width, (columns * bits + 7) / 8, -half, half - 1, bits};
}

/* The first of the entries whose magnitude is the largest. */
INLINE float peak_of(const float *x, int64_t count) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 most = _mm256_setzero_ps();
    float lane[8], largest = 0;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)));
    _mm256_storeu_ps(lane, most);
    for (int j = 0; j < 8; j++) largest = lane[j] > largest ? lane[j] : largest;
    for (; i < count; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    for (i = 0; i + 8 <= count; i += 8) {
        __m256 m = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i));
        int found = _mm256_movemask_ps(_mm256_cmp_ps(m, _mm256_set1_ps(largest), _CMP_EQ_OQ));
        if (found) return x[i + __builtin_ctz((unsigned)found)];
    }
    for (; i < count - 1 && fabsf(x[i]) != largest; i++) {
    }
    return x[i];
}

INLINE __m256 levels_of(__m256 x, __m256 scale, const Grid *grid) {
    __m256 q = _mm256_round_ps(_mm256_div_ps(x, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_min_ps(_mm256_max_ps(q, _mm256_set1_ps(grid->low)), _mm256_set1_ps(grid->high));
}

INLINE float level_of(float x, float scale, const Grid *grid) {
    float q = rintf(x / scale);
    q = q < grid->low ? grid->low : q;
    return q > grid->high ? grid->high : q;
}

/* Sum of squares of what a scale misses of a group. */
INLINE float loss_of(const float *x, int64_t count, float scale, const Grid *grid) {
    float safe = scale == 0 ? 1 : scale;
    __m256 by = _mm256_set1_ps(safe), back = _mm256_set1_ps(scale);
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int half = 0; half < 2; half++) {
            __m256 v = _mm256_loadu_ps(x + i + 8 * half);
            __m256 miss = _mm256_sub_ps(v, _mm256_mul_ps(levels_of(v, by, grid), back));
            sum[half] = _mm256_add_ps(sum[half], _mm256_mul_ps(miss, miss));
        }
    if (i == count) return folded_halves(sum);
    float lane[LANES];
    memcpy(lane, sum, sizeof lane);
    for (int j = 0; i < count; i++, j++) {
        float miss = x[i] - level_of(x[i], safe, grid) * scale;
        lane[j] += miss * miss;
    }
    return folded(lane);
}

/* scales[rows * groups]: of the peak of each group times the shares the one that misses least, the first of such.
 * Returns 0, or -1 where there is no memory. */
int grid_scales(const Pair *pair, int64_t width, int bits, const float *shares, int64_t tries, float *scales) {
    Grid grid = grid_of(pair->columns, width, bits);
    float *x = room_for(grid.columns);
    if (!x) return -1;
    for (int64_t row = 0; row < pair->rows; row++) {
        row_of(pair, row, x);
        for (int64_t from = 0; from < grid.columns; from += width) {
            int64_t count = grid.columns - from < width ? grid.columns - from : width;
            float peak = peak_of(x + from, count), best = 0, least = INFINITY;
            for (int64_t t = 0; t < tries; t++) {
                float scale = peak * shares[t], loss = loss_of(x + from, count, scale, &grid);
                if (loss < least) least = loss, best = scale;
            }
            *scales++ = best;
        }
    }
    free(x);
    return 0;
}

INLINE uint64_t low_bits_of_bytes(int bits) { return 0x0101010101010101ull * ((1u << bits) - 1); }

/* Up to eight bytes: the compiler makes one instruction of a copy whose length it knows. */
INLINE uint64_t read_bytes(const uint8_t *from, int64_t left) {
    uint64_t some = 0;
    if (left >= 8) memcpy(&some, from, 8);
    else memcpy(&some, from, (size_t)left);
    return some;
}

INLINE void write_bytes(uint8_t *to, uint64_t some, int64_t left) {
    if (left >= 8) memcpy(to, &some, 8);
    else memcpy(to, &some, (size_t)left);
}

/* Whether eight columns from a multiple of eight on never lie in two groups. */
INLINE int is_even(const Grid *grid) { return grid->groups <= 1 || grid->width % 8 == 0; }

/* A row of codes, a byte each, whose groups begin anywhere. */
INLINE void wide_codes(const void *variant, int v, const void *base, int b, int64_t at, const Grid *grid,
                       const float *scales, uint8_t *out) {
    for (int64_t m = 0; m < grid->columns; m++) {
        float scale = scales[m / grid->width];
        float level = level_of(one_of(variant, v, base, b, at + m), scale == 0 ? 1 : scale, grid);
        out[m] = (uint8_t)(level - grid->low);
    }
}

/* The same where eight are taken at a time; the last few may be fewer. */
INLINE void even_codes(const void *variant, int v, const void *base, int b, int64_t at, const Grid *grid,
                       const float *scales, uint8_t *out) {
    __m256 low = _mm256_set1_ps(grid->low);
    int64_t whole = grid->columns & ~(int64_t)7;
    for (int64_t g = 0, m = 0; m < whole; g++) {
        int64_t to = (g + 1) * grid->width < whole ? (g + 1) * grid->width : whole;
        __m256 by = _mm256_set1_ps(scales[g] == 0 ? 1 : scales[g]);
        for (; m < to; m += 8) {
            __m256 level = levels_of(eight_of(variant, v, base, b, at + m), by, grid);
            __m256i code = _mm256_cvtps_epi32(_mm256_sub_ps(level, low));
            __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
            _mm_storel_epi64((__m128i *)(out + m), _mm_packus_epi16(narrow, narrow));
        }
    }
    for (int64_t m = whole; m < grid->columns; m++) {
        float scale = scales[m / grid->width];
        float level = level_of(one_of(variant, v, base, b, at + m), scale == 0 ? 1 : scale, grid);
        out[m] = (uint8_t)(level - grid->low);
    }
}

/* codes[rows][bytes]: codes of `bits` bits, low bits first. Returns 0, or -1 where there is no memory. */
int grid_codes(const Pair *pair, int64_t width, int bits, const float *scales, uint8_t *codes) {
    Grid grid = grid_of(pair->columns, width, bits);
    uint8_t *wide = calloc((size_t)grid.columns + 8, 1);
    uint64_t mask = low_bits_of_bytes(bits);
    if (!wide) return -1;
    for (int64_t row = 0; row < pair->rows; row++, scales += grid.groups, codes += grid.bytes) {
        if (is_even(&grid)) {
#define CALL(variant, v, base, b) even_codes(variant, v, base, b, row * grid.columns, &grid, scales, wide)
            BY_DTYPES(pair, CALL);
#undef CALL
        } else {
            wide_codes(pair->variant, pair->variant_dtype, pair->base, pair->base_dtype, row * grid.columns, &grid,
                       scales, wide);
        }
        for (int64_t i = 0; i < (grid.columns + 7) / 8; i++) {
            /* Eight bytes are written where fewer are meant, if what follows will be overwritten. */
            uint64_t some = _pext_u64(read_bytes(wide + 8 * i, 8), mask);
            write_bytes(codes + i * bits, some, grid.bytes - i * bits);
        }
    }
    free(wide);
    return 0;
}

/* Eight centred codes from column m, a multiple of eight, as numbers. */
INLINE __m256 eight_codes(const uint8_t *codes, const Grid *grid, uint64_t mask, int64_t m) {
    int64_t at = m / 8 * grid->bits;
    uint64_t some = _pdep_u64(read_bytes(codes + at, grid->bytes - at), mask);
    __m256i code = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)some));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(code, _mm256_set1_epi32((int)-grid->low)));
}

/* The values that a row's codes stand for; `out` has room for whole eights. */
INLINE void values_of(const uint8_t *codes, const Grid *grid, const float *scales, float *out) {
    uint64_t mask = low_bits_of_bytes(grid->bits);
    int even = is_even(grid);
    for (int64_t g = 0, m = 0; even && g < grid->groups; g++) {
        int64_t to = (g + 1) * grid->width < grid->columns ? (g + 1) * grid->width : grid->columns;
        __m256 scale = _mm256_set1_ps(scales[g]);
        for (; m < to; m += 8) _mm256_storeu_ps(out + m, _mm256_mul_ps(eight_codes(codes, grid, mask, m), scale));
    }
    if (even) return;
    for (int64_t m = 0; m < grid->columns; m += 8) _mm256_storeu_ps(out + m, eight_codes(codes, grid, mask, m));
    for (int64_t g = 0, m = 0; g < grid->groups; g++) {
        int64_t to = (g + 1) * grid->width < grid->columns ? (g + 1) * grid->width : grid->columns;
        for (; m < to; m++) out[m] *= scales[g];
    }
}

/* out[rows][columns]: the values of codes. Returns 0, or -1 where there is no memory. */
int grid_values(const uint8_t *codes, int64_t rows, int64_t columns, int64_t width, int bits, const float *scales,
                float *out) {
    Grid grid = grid_of(columns, width, bits);
    float *x = room_for(columns);
    if (!x) return -1;
    for (int64_t row = 0; row < rows; row++, codes += grid.bytes, scales += grid.groups, out += columns) {
        values_of(codes, &grid, scales, x);
        memcpy(out, x, sizeof(float) * (size_t)columns);
    }
    free(x);
    return 0;
}

/* A chunk's sum of squares of what codes miss, whose groups are whole lanes; columns [from, to) of a row. */
INLINE float even_missed(const void *variant, int v, const void *base, int b, int64_t at, int64_t from, int64_t to,
                         const Grid *grid, const float *scales, const uint8_t *codes) {
    uint64_t mask = low_bits_of_bytes(grid->bits);
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t m = from; m < to;) {
        int64_t g = m / grid->width, end = (g + 1) * grid->width < to ? (g + 1) * grid->width : to;
        __m256 scale = _mm256_set1_ps(scales[g]);
        for (; m < end; m += LANES)
            for (int half = 0; half < 2; half++) {
                int64_t i = m + 8 * half;
                __m256 value = _mm256_mul_ps(eight_codes(codes, grid, mask, i), scale);
                __m256 miss = _mm256_sub_ps(eight_of(variant, v, base, b, at + i), value);
                sum[half] = _mm256_add_ps(sum[half], _mm256_mul_ps(miss, miss));
            }
    }
    return folded_halves(sum);
}

/* Sum of squares of what codes miss of the difference; -1 where there is no memory. */
double grid_missed(const Pair *pair, int64_t width, int bits, const float *scales, const uint8_t *codes) {
    Grid grid = grid_of(pair->columns, width, bits);
    int whole = grid.columns % LANES == 0 && (grid.groups <= 1 || width % LANES == 0);
    float *x = room_for(grid.columns), *value = room_for(grid.columns);
    double total = x && value ? 0 : -1;
    for (int64_t row = 0; row < pair->rows && x && value; row++, codes += grid.bytes, scales += grid.groups) {
        if (!whole) {
            row_of(pair, row, x);
            values_of(codes, &grid, scales, value);
            for (int64_t m = 0; m < grid.columns; m++) x[m] -= value[m];
            add_squares(x, grid.columns, &total);
            continue;
        }
        for (int64_t from = 0; from < grid.columns; from += CHUNK) {
            int64_t to = from + CHUNK < grid.columns ? from + CHUNK : grid.columns;
#define CALL(variant, v, base, b) \
    even_missed(variant, v, base, b, row * grid.columns, from, to, &grid, scales, codes)
            total += BY_DTYPES(pair, CALL);
#undef CALL
        }
    }
    free(x);
    free(value);
    return total;
}
