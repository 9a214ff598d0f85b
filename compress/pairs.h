/* What the loops over rows of two models share: dtypes, rows of differences, sums in a fixed order.
 *
 * Results are the same bits as those of the portable code beside each file: sums run over LANES float32
 * accumulators in column order, which are then folded in halves, and products are not contracted.
 * Functions work on one thread; a packing run has a thread a tensor.
 */
#ifndef DELTAFOLD_PAIRS_H
#define DELTAFOLD_PAIRS_H
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
/* Columns whose numbers are added up in float32, before float64 takes over. */
enum { LANES = 16, CHUNK = 4096 };
enum { F32 = 0, F16 = 1, BF16 = 2 };

/* Rows of a fine-tune's matrix and of its base's; without a base it counts as zero. */
typedef struct {
    const void *variant, *base;
    int64_t rows, columns;
    int32_t variant_dtype, base_dtype;
} Pair;

INLINE float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Eight numbers of a dtype as float32. */
INLINE __m256 eight(const void *from, int dtype, int64_t at) {
    if (dtype == F32) return _mm256_loadu_ps((const float *)from + at);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + at));
    if (dtype == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE float one(const void *from, int dtype, int64_t at) {
    if (dtype == F32) return ((const float *)from)[at];
    uint16_t half = ((const uint16_t *)from)[at];
    return dtype == F16 ? _cvtsh_ss(half) : from_bf16(half);
}

/* Eight differences; `base` may be null. */
INLINE __m256 eight_of(const void *variant, int v, const void *base, int b, int64_t at) {
    return _mm256_sub_ps(eight(variant, v, at), base ? eight(base, b, at) : _mm256_setzero_ps());
}

INLINE float one_of(const void *variant, int v, const void *base, int b, int64_t at) {
    return one(variant, v, at) - (base ? one(base, b, at) : 0);
}

/* Calls with the dtypes that are common known to the compiler. */
#define BY_DTYPES(pair, call)                                                    \
    ((pair)->base && (pair)->variant_dtype == BF16 && (pair)->base_dtype == BF16 \
         ? call((pair)->variant, BF16, (pair)->base, BF16)                       \
         : call((pair)->variant, (pair)->variant_dtype, (pair)->base, (pair)->base_dtype))

INLINE void subtract(const void *variant, int v, const void *base, int b, int64_t from, int64_t to, float *out) {
    int64_t i = from;
    for (; i + 8 <= to; i += 8, out += 8) _mm256_storeu_ps(out, eight_of(variant, v, base, b, i));
    for (; i < to; i++) *out++ = one_of(variant, v, base, b, i);
}

/* out = variant - base, entries [from, to) of the matrices. */
static void difference_of(const Pair *pair, int64_t from, int64_t to, float *out) {
#define CALL(variant, v, base, b) subtract(variant, v, base, b, from, to, out)
    BY_DTYPES(pair, CALL);
#undef CALL
}

/* A row of differences, and room for one. */
INLINE const float *row_of(const Pair *pair, int64_t row, float *out) {
    difference_of(pair, row * pair->columns, (row + 1) * pair->columns, out);
    return out;
}

INLINE float *room_for(int64_t columns) { return malloc(sizeof(float) * (size_t)(columns + LANES)); }

/* The sum of LANES sums, in halves. */
INLINE float folded_halves(const __m256 *sum) {
    __m256 eights = _mm256_add_ps(sum[0], sum[1]);
    __m128 fours = _mm_add_ps(_mm256_castps256_ps128(eights), _mm256_extractf128_ps(eights, 1));
    __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
    return _mm_cvtss_f32(_mm_add_ss(twos, _mm_shuffle_ps(twos, twos, 1)));
}

INLINE float folded(const float *lane) {
    __m256 sum[2] = {_mm256_loadu_ps(lane), _mm256_loadu_ps(lane + 8)};
    return folded_halves(sum);
}

/* Sum of |x| or of x^2, in lanes. */
INLINE float lane_sum(const float *x, int64_t count, int squares) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
        a = squares ? _mm256_mul_ps(a, a) : _mm256_andnot_ps(sign, a);
        b = squares ? _mm256_mul_ps(b, b) : _mm256_andnot_ps(sign, b);
        sum[0] = _mm256_add_ps(sum[0], a);
        sum[1] = _mm256_add_ps(sum[1], b);
    }
    if (i == count) return folded_halves(sum);
    float lane[LANES];
    memcpy(lane, sum, sizeof lane);
    for (int j = 0; i < count; i++, j++) lane[j] += squares ? x[i] * x[i] : fabsf(x[i]);
    return folded(lane);
}

/* Add a row's squares, chunk by chunk. */
INLINE void add_squares(const float *row, int64_t columns, double *total) {
    for (int64_t start = 0; start < columns; start += CHUNK)
        *total += lane_sum(row + start, columns - start < CHUNK ? columns - start : CHUNK, 1);
}

#endif
