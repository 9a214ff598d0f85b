/* What is asked of every pair of rows: the difference, which rows changed, sums. */
#include "pairs.h"

int fast_supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}

/* out = variant - base. */
void difference(const Pair *pair, float *out) { difference_of(pair, 0, pair->rows * pair->columns, out); }

/* changed[n] = whether row n of two matrices of `bytes` bytes a row differs. */
void rows_changed(const uint8_t *a, const uint8_t *b, int64_t rows, int64_t bytes, uint8_t *changed) {
    for (int64_t n = 0; n < rows; n++) changed[n] = memcmp(a + n * bytes, b + n * bytes, (size_t)bytes) != 0;
}

typedef struct {
    __m256 magnitude[2], square[2], weight[2], most;
    __m256i zeros;
} Lanes;

INLINE void count_eight(Lanes *to, int half, __m256 v, __m256 w) {
    __m256 d = _mm256_sub_ps(v, w), m = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), d);
    to->magnitude[half] = _mm256_add_ps(to->magnitude[half], m);
    to->square[half] = _mm256_add_ps(to->square[half], _mm256_mul_ps(d, d));
    to->weight[half] = _mm256_add_ps(to->weight[half], _mm256_mul_ps(w, w));
    to->most = _mm256_max_ps(to->most, m);
    __m256 none = _mm256_cmp_ps(d, _mm256_setzero_ps(), _CMP_EQ_OQ);
    to->zeros = _mm256_sub_epi32(to->zeros, _mm256_castps_si256(none));
}

typedef struct {
    double magnitude, square, weight;
    float largest;
    int64_t zeros;
} Totals;

INLINE void count_chunk(const void *variant, int v, const void *base, int b, int64_t from, int64_t to, Totals *out) {
    Lanes in;
    memset(&in, 0, sizeof in);
    int64_t i = from;
    for (; i + LANES <= to; i += LANES)
        for (int half = 0; half < 2; half++) {
            __m256 w = base ? eight(base, b, i + 8 * half) : _mm256_setzero_ps();
            count_eight(&in, half, eight(variant, v, i + 8 * half), w);
        }
    float magnitude[LANES], square[LANES], weight[LANES], most[8];
    int32_t zeros[8];
    memcpy(magnitude, in.magnitude, sizeof magnitude);
    memcpy(square, in.square, sizeof square);
    memcpy(weight, in.weight, sizeof weight);
    memcpy(most, &in.most, sizeof most);
    memcpy(zeros, &in.zeros, sizeof zeros);
    for (int j = 0; i < to; i++, j++) {
        float w = base ? one(base, b, i) : 0, d = one(variant, v, i) - w, m = fabsf(d);
        magnitude[j] += m;
        square[j] += d * d;
        weight[j] += w * w;
        if (m > most[0]) most[0] = m;
        zeros[0] += d == 0;
    }
    out->magnitude += folded(magnitude);
    out->square += folded(square);
    out->weight += folded(weight);
    for (int j = 0; j < 8; j++) {
        if (most[j] > out->largest) out->largest = most[j];
        out->zeros += zeros[j];
    }
}

/* Of the difference d: sum |d|, sum d^2, max |d|, entries that are not zero; and the sum of the base's squares. */
void totals(const Pair *pair, double *out) {
    int v = pair->variant_dtype, b = pair->base_dtype;
    Totals found = {0};
    for (int64_t row = 0; row < pair->rows; row++) {
        int64_t begin = row * pair->columns, end = begin + pair->columns;
        for (int64_t from = begin; from < end; from += CHUNK) {
            int64_t to = from + CHUNK < end ? from + CHUNK : end;
            if (v == BF16 && b == BF16) count_chunk(pair->variant, BF16, pair->base, BF16, from, to, &found);
            else count_chunk(pair->variant, v, pair->base, b, from, to, &found);
        }
    }
    out[0] = found.magnitude;
    out[1] = found.square;
    out[2] = found.largest;
    out[3] = (double)(pair->rows * pair->columns - found.zeros);
    out[4] = found.weight;
}
