/* The inner loops of the lossless coder: words to symbols, interleaved rANS, low bits, and back.
 *
 * Bytes and words are those of the portable code in `rans.py` and `symbols.py`; docs/format.md has the
 * format. A decoder's input is a stranger's: every read is within the lengths that the caller gives, and
 * what does not fit is refused. Functions work on one thread, for one block.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { SCALE_BITS = 13, TOTAL = 1 << SCALE_BITS, CHUNK = 2048, COUNTS = 64 };
enum { GOOD = 0, FEW_WORDS = -1, BAD_STATES = -2, FEW_LOW = -3, MUCH_LOW = -4, CHANGED = -5 };
static const uint32_t LOWEST = 1u << 16;
/* A tensor may begin at any byte of a mapped file. */
#define ANYWHERE __attribute__((aligned(1), may_alias))
#define INLINE static inline __attribute__((always_inline))
typedef uint8_t w8;
typedef uint16_t w16 ANYWHERE;
typedef uint32_t w32 ANYWHERE;
typedef uint64_t w64 ANYWHERE;

/* size: bytes of a word; leading: words without a base, whose first byte is the symbol. */
typedef struct {
    int32_t size, is_float, leading, precision, mantissa, exponents;
} Kind;

/* Where the low bits of the words that leave k are: whole bytes, then 4, 2 and 1 bits. */
typedef struct {
    int64_t many[COUNTS], bytes[COUNTS], four[COUNTS], two[COUNTS], one[COUNTS];
} Layout;

int rans_supported(void) {
    /* Where a CPU has no lzcnt, the instruction is read as another, which finds 0 here. */
    volatile uint32_t one = 1;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_clz(one) == 31;
}

INLINE uint64_t word_at(const void *from, int size, int64_t i) {
    switch (size) {
        case 1: return ((const w8 *)from)[i];
        case 2: return ((const w16 *)from)[i];
        case 4: return ((const w32 *)from)[i];
        default: return ((const w64 *)from)[i];
    }
}

INLINE void set_word(void *to, int size, int64_t i, uint64_t value) {
    switch (size) {
        case 1: ((w8 *)to)[i] = (w8)value; break;
        case 2: ((w16 *)to)[i] = (uint16_t)value; break;
        case 4: ((w32 *)to)[i] = (uint32_t)value; break;
        default: ((w64 *)to)[i] = value;
    }
}

/* Folded differences or rotated words (numbers), and back (undo). For what is no float a place is the word. */
#define WORD_LOOPS(BITS)                                                                                      \
    INLINE uint##BITS##_t ordered##BITS(uint##BITS##_t w, uint##BITS##_t is_float) {                          \
        uint##BITS##_t negative = (uint##BITS##_t)((int##BITS##_t)w >> (BITS - 1));                           \
        return w ^ ((negative | (uint##BITS##_t)1 << (BITS - 1)) & is_float);                                 \
    }                                                                                                         \
    static void numbers##BITS(const Kind *kind, const w##BITS *v, const w##BITS *b, int64_t n, w##BITS *z) {  \
        uint##BITS##_t is_float = (uint##BITS##_t)-kind->is_float;                                            \
        if (kind->leading) {                                                                                  \
            for (int64_t i = 0; i < n; i++)                                                                   \
                z[i] = is_float ? (uint##BITS##_t)(v[i] << 1 | v[i] >> (BITS - 1)) : v[i];                    \
            return;                                                                                           \
        }                                                                                                     \
        for (int64_t i = 0; i < n; i++) {                                                                     \
            uint##BITS##_t step = ordered##BITS(v[i], is_float) - ordered##BITS(b[i], is_float);              \
            z[i] = (uint##BITS##_t)(step << 1) ^ (uint##BITS##_t)((int##BITS##_t)step >> (BITS - 1));         \
        }                                                                                                     \
    }                                                                                                         \
    static void undo##BITS(const Kind *kind, const w##BITS *z, const w##BITS *b, int64_t n, w##BITS *out) {   \
        uint##BITS##_t is_float = (uint##BITS##_t)-kind->is_float, top = (uint##BITS##_t)1 << (BITS - 1);     \
        if (kind->leading) {                                                                                  \
            for (int64_t i = 0; i < n; i++)                                                                   \
                out[i] = is_float ? (uint##BITS##_t)(z[i] >> 1 | z[i] << (BITS - 1)) : z[i];                  \
            return;                                                                                           \
        }                                                                                                     \
        for (int64_t i = 0; i < n; i++) {                                                                     \
            uint##BITS##_t sign = (uint##BITS##_t)(0 - (z[i] & 1));                                           \
            uint##BITS##_t place = ((uint##BITS##_t)(z[i] >> 1) ^ sign) + ordered##BITS(b[i], is_float);      \
            uint##BITS##_t negative = ~(uint##BITS##_t)((int##BITS##_t)place >> (BITS - 1));                  \
            out[i] = place ^ ((negative | top) & is_float);                                                   \
        }                                                                                                     \
    }
WORD_LOOPS(8)
WORD_LOOPS(16)
WORD_LOOPS(32)
WORD_LOOPS(64)

INLINE void numbers(const Kind *kind, int size, const void *v, const void *b, int64_t n, void *z) {
    switch (size) {
        case 1: numbers8(kind, v, b, n, z); break;
        case 2: numbers16(kind, v, b, n, z); break;
        case 4: numbers32(kind, v, b, n, z); break;
        default: numbers64(kind, v, b, n, z);
    }
}

INLINE void undo(const Kind *kind, int size, const void *z, const void *b, int64_t n, void *out) {
    switch (size) {
        case 1: undo8(kind, z, b, n, out); break;
        case 2: undo16(kind, z, b, n, out); break;
        case 4: undo32(kind, z, b, n, out); break;
        default: undo64(kind, z, b, n, out);
    }
}

/* How many low bits a symbol leaves. */
static int low_count(const Kind *kind, int symbol) {
    if (kind->leading) return 8 * kind->size - 8;
    int count = (symbol >> kind->precision) - 1, most = 8 * kind->size - (kind->precision + 1);
    return count < 0 ? 0 : count > most ? most : count;
}

/* The least symbol that leaves any. */
static int first_with_low(const Kind *kind) {
    if (kind->size == 1) return 256;
    return kind->leading ? 0 : 2 << kind->precision;
}

/* How many bits of z, which is not below 2^(p + 1), a symbol leaves: its length less p + 1. */
INLINE int left_of(const Kind *kind, int size, uint64_t z) {
    if (size == 8) return 63 - __builtin_clzll(z) - kind->precision;
    /* The length is a float's exponent. Without its second bit no number is rounded up to a longer one. */
    float value = (float)(int32_t)(((uint32_t)z & ~((uint32_t)z >> 1)) >> 1);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (int)(bits >> 23) - 126 - kind->precision;
}

INLINE void symbols_of(const Kind *kind, int size, const void *z, int64_t n, uint8_t *out) {
    if (kind->leading) {
        for (int64_t i = 0; i < n; i++) out[i] = (uint8_t)(word_at(z, size, i) >> (8 * size - 8));
        return;
    }
    uint32_t fill = (2u << kind->precision) - 1;
    for (int64_t i = 0; i < n; i++) {
        int left = left_of(kind, size, word_at(z, size, i) | fill);
        uint64_t top = size == 8 ? word_at(z, size, i) >> left : (uint32_t)word_at(z, size, i) >> left;
        out[i] = (uint8_t)((uint32_t)(left << kind->precision) + (uint32_t)top);
    }
}

/* Of the base's words the contexts: by `own`, and 0 without a base. */
INLINE void contexts(const Kind *kind, int size, const void *base, int64_t n, const uint8_t *own, uint16_t *out) {
    if (kind->leading || !kind->is_float) {
        for (int64_t i = 0; i < n; i++) out[i] = kind->leading ? 0 : own[0];
        return;
    }
    for (int64_t i = 0; i < n; i++)
        out[i] = own[word_at(base, size, i) >> kind->mantissa & (uint64_t)kind->exponents & 255];
}

INLINE const void *offset(const void *from, int size, int64_t i) {
    return from ? (const uint8_t *)from + size * i : 0;
}

/* Numbers z, symbols and keys (context << 8 | symbol) of n words, at most a chunk. */
INLINE void keys_of(const Kind *kind, int size, const void *v, const void *b, int64_t n, const uint8_t *own,
                    void *z, uint8_t *symbols, uint16_t *keys) {
    numbers(kind, size, v, b, n, z);
    symbols_of(kind, size, z, n, symbols);
    contexts(kind, size, b, n, own, keys);
    for (int64_t i = 0; i < n; i++) keys[i] = (uint16_t)(keys[i] << 8 | symbols[i]);
}

/* Each size gets loops of its own. */
#define BY_SIZE(call)                \
    switch (kind->size) {            \
        case 1: return call(1);      \
        case 2: return call(2);      \
        case 4: return call(4);      \
        default: return call(8);     \
    }

INLINE void exponents_in(const Kind *kind, int size, const void *base, int64_t n, int64_t *counts) {
    for (int64_t i = 0; i < n; i++)
        counts[word_at(base, size, i) >> kind->mantissa & (uint64_t)kind->exponents & 255]++;
}

/* counts[256] of the low bytes of exponents. */
void count_exponents(const Kind *kind, const void *base, int64_t n, int64_t *counts) {
#define CALL(size) exponents_in(kind, size, base, n, counts)
    BY_SIZE(CALL)
#undef CALL
}

INLINE void keys_in(const Kind *kind, int size, const void *v, const void *b, int64_t n, const uint8_t *own,
                    int64_t *counts) {
    uint64_t z[CHUNK];
    uint16_t keys[CHUNK];
    uint8_t symbols[CHUNK];
    for (int64_t at = 0; at < n; at += CHUNK) {
        int64_t many = n - at < CHUNK ? n - at : CHUNK;
        keys_of(kind, size, offset(v, size, at), offset(b, size, at), many, own, z, symbols, keys);
        for (int64_t i = 0; i < many; i++) counts[keys[i]]++;
    }
}

/* counts[256 * contexts] of keys. */
void count_keys(const Kind *kind, const void *v, const void *b, int64_t n, const uint8_t *own, int64_t *counts) {
#define CALL(size) keys_in(kind, size, v, b, n, own, counts)
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

INLINE int64_t encode_in(const Kind *kind, int size, const void *v, const void *b, int64_t n, const uint8_t *own,
                         const uint32_t *pairs, const int64_t *counts, int64_t lanes, uint32_t *states, w16 *words,
                         uint8_t *values, uint8_t *low, int64_t low_bytes) {
    uint64_t z[CHUNK];
    uint16_t keys[CHUNK], list[CHUNK];
    uint8_t symbols[CHUNK], leaves[256];
    Layout in = {0};
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
        keys_of(kind, size, offset(v, size, at), offset(b, size, at), stop - at, own, z, symbols, keys);
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

typedef struct {
    const w16 *at, *end;
} Words;

/* A row's part in whole eights of lanes. Returns how many lanes, or what is wrong. */
INLINE int64_t decode_eights(const uint16_t *context, int64_t many, const uint8_t *slots, const uint32_t *pairs,
                             uint32_t *states, Words *words, uint8_t *out) {
    const __m256i slot_mask = _mm256_set1_epi32(TOTAL - 1), byte = _mm256_set1_epi32(255);
    const __m256i low_half = _mm256_set1_epi32(65535), zero = _mm256_setzero_si256();
    const __m256i lowest_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4,
                                                  8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const w16 *at = words->at;
    int64_t i = 0;
    for (; i + 8 <= many; i += 8) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(states + i));
        __m256i c = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(context + i)));
        __m256i slot = _mm256_and_si256(x, slot_mask);
        __m256i place = _mm256_or_si256(_mm256_slli_epi32(c, SCALE_BITS), slot);
        __m256i symbol = _mm256_and_si256(_mm256_i32gather_epi32((const int *)slots, place, 1), byte);
        __m256i key = _mm256_or_si256(_mm256_slli_epi32(c, 8), symbol);
        __m256i pair = _mm256_i32gather_epi32((const int *)pairs, key, 4);
        x = _mm256_mullo_epi32(_mm256_srli_epi32(pair, 16), _mm256_srli_epi32(x, SCALE_BITS));
        x = _mm256_add_epi32(x, _mm256_sub_epi32(slot, _mm256_and_si256(pair, low_half)));
        __m256i small = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), zero);
        int mask = _mm256_movemask_ps(_mm256_castsi256_ps(small));
        __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
        next = _mm256_permutevar8x32_epi32(next, by_lane(taken, mask));
        __m256i longer = _mm256_or_si256(_mm256_slli_epi32(x, 16), next);
        _mm256_storeu_si256((__m256i *)(states + i), _mm256_blendv_epi8(x, longer, small));
        int64_t used = __builtin_popcount((unsigned)mask);
        if (used > words->end - at) return FEW_WORDS;
        at += used;
        __m256i packed = _mm256_shuffle_epi8(symbol, lowest_bytes);
        __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
        _mm_storel_epi64((__m128i *)(out + i), both);
    }
    words->at = at;
    return i;
}

/* A row's part: out[many] gets symbols. */
INLINE int decode_row(const uint16_t *context, int64_t many, const uint8_t *slots, const uint32_t *pairs,
                      uint32_t *states, Words *words, uint8_t *out) {
    int64_t i = decode_eights(context, many, slots, pairs, states, words, out);
    if (i < 0) return (int)i;
    for (; i < many; i++) {
        uint32_t x = states[i], slot = x & (TOTAL - 1), c = context[i];
        uint32_t symbol = slots[c << SCALE_BITS | slot], pair = pairs[c << 8 | symbol];
        x = (pair >> 16) * (x >> SCALE_BITS) + slot - (pair & 65535);
        if (x < LOWEST) {
            if (words->at == words->end) return FEW_WORDS;
            x = x << 16 | *words->at++;
        }
        states[i] = x;
        out[i] = (uint8_t)symbol;
    }
    return GOOD;
}

INLINE int decode_symbols(const Kind *kind, int size, const void *b, int64_t n, const uint8_t *own, const uint8_t *slots,
                          const uint32_t *pairs, uint32_t *states, int64_t lanes, Words *words, uint8_t *symbols) {
    uint16_t context[CHUNK];
    int64_t at = 0, row = 0;
    while (at < n) {
        int64_t start = at, stop = n - at < CHUNK ? n : at + CHUNK;
        contexts(kind, size, offset(b, size, at), stop - at, own, context);
        while (at < stop) {
            int64_t until = lanes < stop - row ? row + lanes : stop;
            int found = decode_row(context + (at - start), until - at, slots, pairs, states + (at - row), words,
                                   symbols + at);
            if (found) return found;
            at = until;
            if (at - row == lanes) row = at;
        }
    }
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
    int error = decode_symbols(kind, size, b, n, own, slots, pairs, states, lanes, &stream, symbols);
    if (error) return error;
    Layout in = {0};
    int first = first_with_low(kind);
    for (int s = 0; s < 256; s++) {
        int k = leaves[s] = (uint8_t)low_count(kind, s);
        tops[s] = (uint64_t)(kind->leading ? s : s - (k << kind->precision)) << k;
    }
    for (int64_t at = 0; at < n; at += CHUNK) {
        int64_t many = listed(symbols + at, n - at < CHUNK ? n - at : CHUNK, first, list);
        for (int64_t m = 0; m < many; m++) in.many[leaves[symbols[at + list[m]]]]++;
    }
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
