/* The lossless coder's blocks: words to symbols, interleaved rANS, low bits, and back.
 *
 * Bytes and words are those of the portable code in `rans.py` and `symbols.py`; docs/format.md has the
 * format. A decoder's input is a stranger's: every read is within the lengths that the caller gives, and
 * what does not fit is refused. Functions work on one thread, for one block.
 */
#include <stdlib.h>
#include "rans_contexts.h"
#include "rans_low.h"
#include "rans_stream.h"

int rans_supported(void) {
    /* Where a CPU has no lzcnt, the instruction is read as another, which finds 0 here. */
    volatile uint32_t one = 1;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_clz(one) == 31;
}

/* Numbers z, symbols and keys (context << 8 | symbol) of n words, at most a chunk. */
INLINE void keys_of(const Kind *kind, int size, const void *v, const void *b, int64_t n, const Contexts *in,
                    void *z, uint8_t *symbols, uint16_t *keys) {
    uint8_t context[CHUNK];
    numbers(kind, size, v, b, n, z);
    symbols_of(kind, size, z, n, symbols);
    contexts(kind, size, b, n, in, context);
    for (int64_t i = 0; i < n; i++) keys[i] = (uint16_t)(context[i] << 8 | symbols[i]);
}

/* Counters side by side: where the same thing comes twice in a row, the second does not wait for the first. */
enum { SIDES = 4 };

INLINE void exponents_in(const Kind *kind, int size, const void *base, int64_t n, int64_t *counts) {
    uint32_t some[SIDES][256];
    int shift = kind->mantissa;
    uint64_t mask = (uint64_t)kind->exponents & 255;
    memset(some, 0, sizeof some);
    int64_t i = 0;
    for (; i + SIDES <= n; i += SIDES)
        for (int j = 0; j < SIDES; j++) some[j][word_at(base, size, i + j) >> shift & mask]++;
    for (; i < n; i++) some[0][word_at(base, size, i) >> shift & mask]++;
    for (int j = 0; j < SIDES; j++)
        for (int e = 0; e < 256; e++) counts[e] += some[j][e];
}

/* counts[256] of the low bytes of exponents, of fewer than 2^32 words. */
void count_exponents(const Kind *kind, const void *base, int64_t n, int64_t *counts) {
#define CALL(size) exponents_in(kind, size, base, n, counts)
    BY_SIZE(CALL)
#undef CALL
}

INLINE int keys_in(const Kind *kind, int size, const void *v, const void *b, int64_t n, const uint8_t *own,
                   int64_t rows, int64_t *counts) {
    uint64_t z[CHUNK];
    uint16_t keys[CHUNK];
    uint8_t symbols[CHUNK];
    Contexts in = contexts_of(own);
    uint32_t *even = calloc((size_t)(2 * 256 * rows), 4), *odd = even + 256 * rows;
    if (!even) return -1;
    for (int64_t at = 0; at < n; at += CHUNK) {
        int64_t many = n - at < CHUNK ? n - at : CHUNK, i = 0;
        keys_of(kind, size, offset(v, size, at), offset(b, size, at), many, &in, z, symbols, keys);
        for (; i + 2 <= many; i += 2) even[keys[i]]++, odd[keys[i + 1]]++;
        if (i < many) even[keys[i]]++;
    }
    for (int64_t key = 0; key < 256 * rows; key++) counts[key] += (int64_t)even[key] + odd[key];
    free(even);
    return 0;
}

/* counts[256 * rows] of keys, of fewer than 2^32 words; own[256] are below rows.
 * Returns 0, or -1 where there is no memory. */
int count_keys(const Kind *kind, const void *v, const void *b, int64_t n, const uint8_t *own, int64_t rows,
               int64_t *counts) {
#define CALL(size) keys_in(kind, size, v, b, n, own, rows, counts)
    BY_SIZE(CALL)
#undef CALL
}

/* Of frequencies[rows * 256]: slots[rows * TOTAL + 3], of which 3 are read and not used, by slot the symbol;
 * pairs[rows * 256], by key frequency << 16 | start. */
void coding_tables(const uint16_t *frequencies, int64_t rows, uint8_t *slots, uint32_t *pairs) {
    for (int64_t row = 0; row < rows; row++, slots += TOTAL) {
        uint32_t start = 0;
        memset(slots, 0, TOTAL);
        for (int s = 0; s < 256; s++, frequencies++) {
            uint32_t f = *frequencies;
            if (f > TOTAL - start) f = TOTAL - start;
            memset(slots + start, s, f);
            *pairs++ = f << 16 | start;
            start += f;
        }
    }
}

INLINE int64_t encode_in(const Kind *kind, int size, const void *v, const void *b, int64_t n, const uint8_t *own,
                         const uint32_t *pairs, const int64_t *counts, int64_t lanes, uint32_t *states, w16 *words,
                         uint8_t *values, uint8_t *low, int64_t low_bytes) {
    uint64_t z[CHUNK];
    uint16_t keys[CHUNK], list[CHUNK];
    uint8_t symbols[CHUNK], leaves[256];
    Layout in = {0};
    Contexts by = contexts_of(own);
    int first = first_with_low(kind);
    for (int s = 0; s < 256; s++) in.many[leaves[s] = (uint8_t)low_count(kind, s)] += counts[s];
    if (planes(&in) != low_bytes) return CHANGED;
    int64_t begin[COUNTS], next[COUNTS];
    begins(&in, begin);
    for (int k = 0; k < COUNTS; k++) next[k] = begin[k] + in.many[k];
    for (int64_t i = 0; i < lanes; i++) states[i] = LOWEST;
    w16 *end = words + 8 + n, *to = end;
    for (int64_t stop = n; stop;) {
        int64_t at = (stop - 1) / CHUNK * CHUNK;
        keys_of(kind, size, offset(v, size, at), offset(b, size, at), stop - at, &by, z, symbols, keys);
        for (int64_t m = listed(symbols, stop - at, first, list) - 1; m >= 0; m--) {
            int k = leaves[symbols[list[m]]];
            /* Who changes a tensor while it is coded gets an error, not a broken heap. */
            if (next[k] == begin[k]) return CHANGED;
            set_word(values, size, --next[k], word_at(z, size, list[m]));
        }
        while (stop > at) {
            int64_t row = (stop - 1) / lanes * lanes, from = row > at ? row : at;
            to = encode_row(keys + (from - at), stop - from, pairs, states + (from - row), to);
            stop = from;
        }
    }
    for (int k = 1; k < COUNTS; k++)
        if (next[k] != begin[k]) return CHANGED;
    pack_planes(&in, size, values, low);
    memmove(words, to, (size_t)((uint8_t *)end - (uint8_t *)to));
    return end - to;
}

/* Code a block.
 * counts[256]: how often each symbol occurs in it, n together. states[lanes], words[n + 8] and low[low_bytes] are
 * filled; values[n] words are room to work in.
 * Returns how many words there are, or an error. */
int64_t encode_block(const Kind *kind, const void *v, const void *b, int64_t n, const uint8_t *own,
                     const uint32_t *pairs, const int64_t *counts, int64_t lanes, uint32_t *states, uint16_t *words,
                     uint8_t *values, uint8_t *low, int64_t low_bytes) {
#define CALL(size) encode_in(kind, size, v, b, n, own, pairs, counts, lanes, states, words, values, low, low_bytes)
    BY_SIZE(CALL)
#undef CALL
}

/* The symbols of n words, and how many of them leave how many low bits. Returns GOOD or what is wrong. */
INLINE int decode_symbols(const Kind *kind, int size, const void *b, int64_t n, const uint8_t *own,
                          const uint8_t *slots, const uint32_t *pairs, uint32_t *states, int64_t lanes, Words *words,
                          const uint8_t *leaves, uint8_t *symbols, Layout *in) {
    uint8_t context[CHUNK];
    uint16_t list[CHUNK];
    int64_t sides[SIDES][COUNTS] = {{0}};
    Contexts by = contexts_of(own);
    int first = first_with_low(kind);
    int64_t at = 0, row = 0;
    while (at < n) {
        int64_t start = at, stop = n - at < CHUNK ? n : at + CHUNK;
        contexts(kind, size, offset(b, size, at), stop - at, &by, context);
        while (at < stop) {
            int64_t until = lanes < stop - row ? row + lanes : stop;
            int found = decode_row(context + (at - start), until - at, slots, pairs, states + (at - row), words,
                                   symbols + at);
            if (found) return found;
            at = until;
            if (at - row == lanes) row = at;
        }
        int64_t many = listed(symbols + start, stop - start, first, list);
        for (int64_t m = 0; m < many; m++) sides[m % SIDES][leaves[symbols[start + list[m]]]]++;
    }
    for (int j = 0; j < SIDES; j++)
        for (int k = 0; k < COUNTS; k++) in->many[k] += sides[j][k];
    for (int64_t i = 0; i < lanes; i++)
        if (states[i] != LOWEST) return BAD_STATES;
    return words->at == words->end ? GOOD : BAD_STATES;
}

INLINE int decode_in(const Kind *kind, int size, const void *b, int64_t n, const uint8_t *own, const uint8_t *slots,
                     const uint32_t *pairs, uint32_t *states, int64_t lanes, const w16 *words, int64_t many_words,
                     const uint8_t *low, int64_t low_bytes, uint8_t *symbols, uint8_t *values,
                     void *out) {
    uint64_t z[CHUNK], tops[256];
    uint16_t list[CHUNK];
    uint8_t leaves[256];
    Words stream = {words, words + many_words};
    Layout in = {0};
    int first = first_with_low(kind);
    for (int s = 0; s < 256; s++) {
        int k = leaves[s] = (uint8_t)low_count(kind, s);
        tops[s] = (uint64_t)(kind->leading ? s : s - (k << kind->precision)) << k;
    }
    int error = decode_symbols(kind, size, b, n, own, slots, pairs, states, lanes, &stream, leaves, symbols, &in);
    if (error) return error;
    int64_t expected = planes(&in), next[COUNTS];
    if (expected != low_bytes) return expected > low_bytes ? FEW_LOW : MUCH_LOW;
    unpack_planes(&in, size, values, low);
    begins(&in, next);
    for (int64_t at = 0; at < n; at += CHUNK) {
        int64_t count = n - at < CHUNK ? n - at : CHUNK;
        const uint8_t *own_symbols = symbols + at;
        for (int64_t i = 0; i < count; i++) set_word(z, size, i, own_symbols[i]);
        int64_t many = listed(own_symbols, count, first, list);
        for (int64_t m = 0; m < many; m++) {
            int64_t i = list[m];
            int symbol = own_symbols[i];
            set_word(z, size, i, tops[symbol] | word_at(values, size, next[leaves[symbol]]++));
        }
        undo(kind, size, z, offset(b, size, at), count, (uint8_t *)out + size * at);
    }
    return GOOD;
}

/* The words behind `encode_block`. `states` is used up; symbols[n] and values[n] words are room to work in.
 * own[256] are below the tables' rows; lanes is at least 1; 8 more words can be read and are not used.
 * Returns GOOD or what is wrong. */
int decode_block(const Kind *kind, const void *b, int64_t n, const uint8_t *own, const uint8_t *slots,
                 const uint32_t *pairs, uint32_t *states, int64_t lanes, const uint16_t *words, int64_t many_words,
                 const uint8_t *low, int64_t low_bytes, uint8_t *symbols, uint8_t *values,
                 void *out) {
#define CALL(size)                                                                                                   \
    decode_in(kind, size, b, n, own, slots, pairs, states, lanes, words, many_words, low, low_bytes, symbols, values, out)
    BY_SIZE(CALL)
#undef CALL
}
