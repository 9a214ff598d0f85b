/* Interleaved rANS: symbols under contexts as words and states, and back. As `rans.py` has it. */
#ifndef DELTAFOLD_RANS_STREAM_H
#define DELTAFOLD_RANS_STREAM_H
#include "rans_words.h"

enum { SCALE_BITS = 13, TOTAL = 1 << SCALE_BITS };
enum { GOOD = 0, FEW_WORDS = -1, BAD_STATES = -2, FEW_LOW = -3, MUCH_LOW = -4, CHANGED = -5 };
static const uint32_t LOWEST = 1u << 16;

/* By which lanes take or give a word: which of the next words each takes, and which lanes give the last of
 * 8 words; a byte each. */
static uint64_t taken[256], given[256];

__attribute__((constructor)) static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++) {
        int first = 8 - __builtin_popcount((unsigned)mask);
        for (int lane = 0; lane < 8; lane++) {
            int before = __builtin_popcount((unsigned)mask & ((1u << lane) - 1));
            taken[mask] |= (uint64_t)before << 8 * lane;
            if (mask >> lane & 1) given[mask] |= (uint64_t)lane << 8 * (first + before);
        }
    }
}

INLINE __m256i by_lane(const uint64_t *table, int mask) {
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)table[mask]));
}

/* floor(x / f) of four numbers. Exact: a quotient of such numbers is never so close below a whole one that it
 * rounds up. An f of 0 gives anything. */
INLINE __m128i quotients(__m128i x, __m128i f) {
    const __m256d magic = _mm256_set1_pd(4503599627370496.0); /* 2^52, whose last bits x becomes */
    __m256d wide = _mm256_or_pd(_mm256_castsi256_pd(_mm256_cvtepu32_epi64(x)), magic);
    return _mm256_cvttpd_epi32(_mm256_div_pd(_mm256_sub_pd(wide, magic), _mm256_cvtepi32_pd(f)));
}

/* Eight lanes. Words go in front of `words`, where there is room for 8. */
INLINE w16 *encode_eight(const uint16_t *keys, const uint32_t *pairs, uint32_t *states, w16 *words) {
    const __m256i low_half = _mm256_set1_epi32(65535), one = _mm256_set1_epi32(1), total = _mm256_set1_epi32(TOTAL);
    __m256i x = _mm256_loadu_si256((const __m256i *)states);
    __m256i key = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)keys));
    __m256i pair = _mm256_i32gather_epi32((const int *)pairs, key, 4), f = _mm256_srli_epi32(pair, 16);
    __m256i full = _mm256_cmpgt_epi32(_mm256_srli_epi32(x, 32 - SCALE_BITS), _mm256_sub_epi32(f, one));
    int mask = _mm256_movemask_ps(_mm256_castsi256_ps(full));
    __m256i moved = _mm256_and_si256(_mm256_permutevar8x32_epi32(x, by_lane(given, mask)), low_half);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(moved), _mm256_extracti128_si256(moved, 1));
    _mm_storeu_si128((__m128i *)(words - 8), packed);
    x = _mm256_blendv_epi8(x, _mm256_srli_epi32(x, 16), full);
    __m256i quotient = _mm256_set_m128i(
        quotients(_mm256_extracti128_si256(x, 1), _mm256_extracti128_si256(f, 1)),
        quotients(_mm256_castsi256_si128(x), _mm256_castsi256_si128(f)));
    x = _mm256_add_epi32(x, _mm256_mullo_epi32(quotient, _mm256_sub_epi32(total, f)));
    _mm256_storeu_si256((__m256i *)states, _mm256_add_epi32(x, _mm256_and_si256(pair, low_half)));
    return words - __builtin_popcount((unsigned)mask);
}

/* A row's part: a lane each, the last one first. */
INLINE w16 *encode_row(const uint16_t *keys, int64_t many, const uint32_t *pairs, uint32_t *states, w16 *words) {
    for (; many % 8; many--) {
        uint32_t x = states[many - 1], pair = pairs[keys[many - 1]], f = pair >> 16;
        if ((x >> (32 - SCALE_BITS)) >= f) {
            *--words = (uint16_t)x;
            x >>= 16;
        }
        states[many - 1] = x + (f ? x / f : 0) * (TOTAL - f) + (pair & 65535);
    }
    for (int64_t i = many - 8; i >= 0; i -= 8) words = encode_eight(keys + i, pairs, states + i, words);
    return words;
}

typedef struct {
    const w16 *at, *end;
} Words;

/* Symbols that are looked up together. Two gathers a step would leave the processor little room to look ahead over
 * their many small operations; plain loads of a batch, apart from the arithmetic, are half again as quick. */
enum { BATCH = 64 };

/* Where the symbols of lanes are to be found, and by `key | symbol` their frequencies. */
INLINE void places_of(const uint8_t *context, const uint32_t *states, int64_t many, uint32_t *place, uint32_t *key) {
    const __m256i slot_mask = _mm256_set1_epi32(TOTAL - 1);
    for (int64_t i = 0; i < many; i += 8) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(states + i));
        __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(context + i)));
        __m256i slot = _mm256_and_si256(x, slot_mask);
        _mm256_storeu_si256((__m256i *)(place + i), _mm256_or_si256(_mm256_slli_epi32(c, SCALE_BITS), slot));
        _mm256_storeu_si256((__m256i *)(key + i), _mm256_slli_epi32(c, 8));
    }
}

INLINE void look_up(const uint32_t *place, const uint32_t *key, int64_t many, const uint8_t *slots,
                    const uint32_t *pairs, uint8_t *out, uint32_t *pair) {
    for (int64_t i = 0; i < many; i += 4) {
        uint32_t a = slots[place[i]], b = slots[place[i + 1]], c = slots[place[i + 2]], d = slots[place[i + 3]];
        uint32_t four = a | b << 8 | c << 16 | d << 24;
        memcpy(out + i, &four, 4);
        pair[i] = pairs[key[i] | a];
        pair[i + 1] = pairs[key[i + 1] | b];
        pair[i + 2] = pairs[key[i + 2] | c];
        pair[i + 3] = pairs[key[i + 3] | d];
    }
}

/* Take the symbols off the states. Returns GOOD or FEW_WORDS. */
INLINE int advance(uint32_t *states, const uint32_t *pairs, int64_t many, Words *words) {
    const __m256i slot_mask = _mm256_set1_epi32(TOTAL - 1), low_half = _mm256_set1_epi32(65535);
    const w16 *at = words->at;
    for (int64_t i = 0; i < many; i += 8) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(states + i));
        __m256i pair = _mm256_loadu_si256((const __m256i *)(pairs + i)), slot = _mm256_and_si256(x, slot_mask);
        x = _mm256_mullo_epi32(_mm256_srli_epi32(pair, 16), _mm256_srli_epi32(x, SCALE_BITS));
        x = _mm256_add_epi32(x, _mm256_sub_epi32(slot, _mm256_and_si256(pair, low_half)));
        __m256i small = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
        int mask = _mm256_movemask_ps(_mm256_castsi256_ps(small));
        __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
        next = _mm256_permutevar8x32_epi32(next, by_lane(taken, mask));
        __m256i longer = _mm256_or_si256(_mm256_slli_epi32(x, 16), next);
        _mm256_storeu_si256((__m256i *)(states + i), _mm256_blendv_epi8(x, longer, small));
        int64_t used = __builtin_popcount((unsigned)mask);
        if (used > words->end - at) return FEW_WORDS;
        at += used;
    }
    words->at = at;
    return GOOD;
}

/* A row's part: out[many] gets symbols. Returns GOOD or FEW_WORDS. */
INLINE int decode_row(const uint8_t *context, int64_t many, const uint8_t *slots, const uint32_t *pairs,
                      uint32_t *states, Words *words, uint8_t *out) {
    uint32_t place[BATCH], key[BATCH], pair[BATCH];
    int64_t i = 0, eights = many & ~(int64_t)7;
    while (i < eights) {
        int64_t some = eights - i < BATCH ? eights - i : BATCH;
        places_of(context + i, states + i, some, place, key);
        look_up(place, key, some, slots, pairs, out + i, pair);
        if (advance(states + i, pair, some, words)) return FEW_WORDS;
        i += some;
    }
    for (; i < many; i++) {
        uint32_t x = states[i], slot = x & (TOTAL - 1), c = context[i];
        uint32_t symbol = slots[c << SCALE_BITS | slot], one = pairs[c << 8 | symbol];
        x = (one >> 16) * (x >> SCALE_BITS) + slot - (one & 65535);
        if (x < LOWEST) {
            if (words->at == words->end) return FEW_WORDS;
            x = x << 16 | *words->at++;
        }
        states[i] = x;
        out[i] = (uint8_t)symbol;
    }
    return GOOD;
}

#endif
