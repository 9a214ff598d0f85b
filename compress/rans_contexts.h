/* What a base's words tell of how large differences are: by the low byte of an exponent its context. */
#ifndef DELTAFOLD_RANS_CONTEXTS_H
#define DELTAFOLD_RANS_CONTEXTS_H
#include "rans_words.h"

/* Contexts by exponent. Those of a trained tensor are few neighbours, which two shuffles look up 32 at a time.
 * near: whether all exponents that have one lie in the 32 from `first` on, by[2][16] being theirs. */
typedef struct {
    const uint8_t *own;
    int first, near;
    uint8_t by[2][16];
} Contexts;

static Contexts contexts_of(const uint8_t *own) {
    Contexts to = {.own = own};
    int last = 0;
    for (int e = 255; e >= 0; e--)
        if (own[e]) to.first = e;
    for (int e = 0; e < 256; e++)
        if (own[e]) last = e;
    to.near = last < to.first + 32;
    for (int e = to.first; e <= last && to.near; e++) to.by[(e - to.first) / 16][(e - to.first) % 16] = own[e];
    return to;
}

/* Of 32 exponents the contexts. */
INLINE __m256i near_contexts(const Contexts *in, __m256i exponents) {
    const __m256i range = _mm256_set1_epi8(0x70);
    __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)in->by[0]));
    __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)in->by[1]));
    __m256i at = _mm256_sub_epi8(exponents, _mm256_set1_epi8((char)in->first));
    /* Only 0 to 15 stay below 128, above which a shuffle gives 0. */
    __m256i found = _mm256_shuffle_epi8(low, _mm256_adds_epu8(at, range));
    at = _mm256_sub_epi8(at, _mm256_set1_epi8(16));
    return _mm256_or_si256(found, _mm256_shuffle_epi8(high, _mm256_adds_epu8(at, range)));
}

INLINE __m256i exponents_16(const Kind *kind, const uint8_t *words) {
    const __m256i mask = _mm256_set1_epi16((short)kind->exponents);
    const __m128i shift = _mm_cvtsi32_si128(kind->mantissa);
    __m256i half[2];
    for (int j = 0; j < 2; j++) {
        half[j] = _mm256_loadu_si256((const __m256i *)(words + 32 * j));
        half[j] = _mm256_and_si256(_mm256_srl_epi16(half[j], shift), mask);
    }
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(half[0], half[1]), 0xD8);
}

INLINE __m256i exponents_32(const Kind *kind, const uint8_t *words) {
    const __m256i mask = _mm256_set1_epi32(kind->exponents);
    const __m128i shift = _mm_cvtsi32_si128(kind->mantissa);
    __m256i part[4];
    for (int j = 0; j < 4; j++) {
        part[j] = _mm256_loadu_si256((const __m256i *)(words + 32 * j));
        part[j] = _mm256_and_si256(_mm256_srl_epi32(part[j], shift), mask);
    }
    __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(part[0], part[1]), _mm256_packus_epi32(part[2], part[3]));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* Of n words of the base the contexts; 0 without a base. */
INLINE void contexts(const Kind *kind, int size, const void *base, int64_t n, const Contexts *in, uint8_t *out) {
    if (kind->leading || !kind->is_float) {
        for (int64_t i = 0; i < n; i++) out[i] = kind->leading ? 0 : in->own[0];
        return;
    }
    int64_t i = 0;
    if (in->near && (size == 2 || size == 4))
        for (; i + 32 <= n; i += 32) {
            const uint8_t *words = (const uint8_t *)base + size * i;
            __m256i exponents = size == 2 ? exponents_16(kind, words) : exponents_32(kind, words);
            _mm256_storeu_si256((__m256i *)(out + i), near_contexts(in, exponents));
        }
    const uint8_t *own = in->own;
    int shift = kind->mantissa;
    uint64_t mask = (uint64_t)kind->exponents & 255;
    for (; i < n; i++) out[i] = own[word_at(base, size, i) >> shift & mask];
}

#endif
