/* Words as numbers, and numbers as symbols and low bits: differences to a base's words, and back.
 *
 * As `symbols.py` has it; docs/format.md has the format.
 */
#ifndef DELTAFOLD_RANS_WORDS_H
#define DELTAFOLD_RANS_WORDS_H
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* Words that are worked on at a time. */
enum { CHUNK = 2048 };
/* A tensor may begin at any byte of a mapped file. */
#define ANYWHERE __attribute__((aligned(1), may_alias))
#define INLINE static inline __attribute__((always_inline))
typedef uint8_t w8;
typedef uint16_t w16 ANYWHERE;
typedef uint32_t w32 ANYWHERE;
typedef uint64_t w64 ANYWHERE;

/* The common sizes get loops of their own; each takes a compiler seconds. */
#define BY_SIZE(call)                   \
    switch (kind->size) {               \
        case 2: return call(2);         \
        case 4: return call(4);         \
        default: return call(kind->size); \
    }

/* size: bytes of a word; leading: words without a base, whose first byte is the symbol. */
typedef struct {
    int32_t size, is_float, leading, precision, mantissa, exponents;
} Kind;

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

INLINE const void *offset(const void *from, int size, int64_t i) {
    return from ? (const uint8_t *)from + size * i : 0;
}

#endif
