/* Low bits that are kept as they are: sorted by how many a word leaves, in planes of 8, 4, 2 and 1 bits. */
#ifndef DELTAFOLD_RANS_LOW_H
#define DELTAFOLD_RANS_LOW_H
#include "rans_words.h"

/* Numbers of low bits that a word may leave. */
enum { COUNTS = 64 };

/* Where the low bits of the words that leave k are: whole bytes, then 4, 2 and 1 bits. */
typedef struct {
    int64_t many[COUNTS], bytes[COUNTS], four[COUNTS], two[COUNTS], one[COUNTS];
} Layout;

/* Fill in where planes begin, many[] being known. Returns how many bytes there are. */
static int64_t planes(Layout *to) {
    int64_t at = 0;
    for (int k = 1; k < COUNTS; k++) {
        int64_t many = to->many[k];
        to->bytes[k] = at;
        at += many * (k / 8);
        to->four[k] = at;
        at += k & 4 ? (many + 1) / 2 : 0;
        to->two[k] = at;
        at += k & 2 ? (many + 3) / 4 : 0;
        to->one[k] = at;
        at += k & 1 ? (many + 7) / 8 : 0;
    }
    return at;
}

/* Bits [shift, shift + width) of n words, 8 / width of them a byte, and back: to words whose bits they complete. */
INLINE void pack(const void *values, int size, int64_t n, int shift, int width, uint8_t *out) {
    int per_byte = 8 / width;
    uint32_t mask = (1u << width) - 1;
    for (int64_t i = 0; i < n / per_byte; i++) {
        uint32_t byte = 0;
        for (int j = 0; j < per_byte; j++)
            byte |= ((uint32_t)(word_at(values, size, i * per_byte + j) >> shift) & mask) << (j * width);
        out[i] = (uint8_t)byte;
    }
    int64_t done = n / per_byte * per_byte;
    if (done == n) return;
    out[n / per_byte] = 0;
    for (int64_t i = done; i < n; i++)
        out[n / per_byte] |= (uint8_t)(((uint32_t)(word_at(values, size, i) >> shift) & mask) << ((i - done) * width));
}

INLINE void unpack(void *values, int size, int64_t n, int shift, int width, const uint8_t *from) {
    int per_byte = 8 / width;
    uint32_t mask = (1u << width) - 1;
    for (int64_t i = 0; i < n / per_byte * per_byte; i += per_byte, from++)
        for (int j = 0; j < per_byte; j++)
            set_word(values, size, i + j,
                     word_at(values, size, i + j) | (uint64_t)(*from >> (j * width) & mask) << shift);
    for (int64_t i = n / per_byte * per_byte; i < n; i++)
        set_word(values, size, i,
                 word_at(values, size, i) | (uint64_t)(*from >> (i % per_byte * width) & mask) << shift);
}

/* The low bits of words that lie sorted by k, and back. */
INLINE void pack_planes(const Layout *in, int size, const uint8_t *values, uint8_t *low) {
    for (int k = 1; k < 8 * size; values += size * in->many[k], k++) {
        int64_t many = in->many[k];
        int whole = k & ~7;
        for (int shift = 0; shift < whole; shift += 8)
            pack(values, size, many, shift, 8, low + in->bytes[k] + many * (shift / 8));
        if (k & 4) pack(values, size, many, whole, 4, low + in->four[k]);
        if (k & 2) pack(values, size, many, whole + (k & 4), 2, low + in->two[k]);
        if (k & 1) pack(values, size, many, whole + (k & 6), 1, low + in->one[k]);
    }
}

INLINE void unpack_planes(const Layout *in, int size, uint8_t *values, const uint8_t *low) {
    for (int k = 1; k < 8 * size; values += size * in->many[k], k++) {
        int64_t many = in->many[k];
        int whole = k & ~7;
        memset(values, 0, (size_t)(size * many));
        for (int shift = 0; shift < whole; shift += 8)
            unpack(values, size, many, shift, 8, low + in->bytes[k] + many * (shift / 8));
        if (k & 4) unpack(values, size, many, whole, 4, low + in->four[k]);
        if (k & 2) unpack(values, size, many, whole + (k & 4), 2, low + in->two[k]);
        if (k & 1) unpack(values, size, many, whole + (k & 6), 1, low + in->one[k]);
    }
}

/* Where the words of each k begin, among those of all k above 0. */
static void begins(const Layout *in, int64_t *at) {
    at[0] = at[1] = 0;
    for (int k = 2; k < COUNTS; k++) at[k] = at[k - 1] + in->many[k - 1];
}

/* Which of n symbols, at most a chunk, are at least `first`: they leave low bits. */
INLINE int64_t listed(const uint8_t *symbols, int64_t n, int first, uint16_t *list) {
    int64_t many = 0, i = 0;
    if (first > 255) return 0;
    __m256i least = _mm256_set1_epi8((char)first);
    for (; i + 32 <= n; i += 32) {
        __m256i some = _mm256_loadu_si256((const __m256i *)(symbols + i));
        uint32_t found = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(some, least), some));
        for (; found; found &= found - 1) list[many++] = (uint16_t)(i + __builtin_ctz(found));
    }
    for (; i < n; i++)
        if (symbols[i] >= first) list[many++] = (uint16_t)i;
    return many;
}

#endif
