/* Products with sign planes on x86 CPUs that have AVX2, or AVX-512.
 *
 * Three columns of signs choose one of eight partial sums +-x0 +-x1 +-x2. Eight floats fill one AVX2
 * register, so a single permute looks up the sum of three columns for eight rows at once; one add and
 * one shift complete it: three instructions for 24 weights. AVX-512 registers hold sixteen floats: four
 * columns for sixteen rows, three instructions for 64 weights. The lookup-table idea follows T-MAC (Wei
 * et al., arXiv 2407.00088); here the tables are float32, so that nothing is rounded on the way.
 *
 * Layout. Rows go in blocks of 32. A group of columns that share a scale takes `words` 32-bit words a
 * row; each word holds ten lookups of three columns, or eight of four, lowest bits first; the columns
 * that pad a group meet zeros in the table. `signs[plane][block][group * words + w][32]`. How many
 * columns a lookup has is an argument: 3 works everywhere, 4 where `signs_columns` says so.
 */
#include <immintrin.h>
#include <stdint.h>

enum { ROWS = 32, WORD = 32 };

#define WIDE __attribute__((target("avx512f")))

int signs_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

/* Columns of a lookup that this CPU is fastest at. */
int signs_columns(void) { return __builtin_cpu_supports("avx512f") ? 4 : 3; }

/* What is multiplied: the arguments of `signs_product` that do not change with the token. */
typedef struct {
    const uint32_t *signs;
    const float *levels, *offsets;
    int64_t planes, groups, width, words, rows, each;
} delta;

static int64_t lookups(const delta *d) { return WORD / d->each; }
static int64_t entries(const delta *d) { return 1 << d->each; }

/* Tables of one token: float [groups][words * lookups][entries]; group sums: float [groups]. */
static void fill_tables(const delta *d, const float *x, int64_t columns, float *tables, float *sums) {
    int64_t each = d->each, count = entries(d);
    for (int64_t g = 0; g < d->groups; g++) {
        int64_t first = g * d->width, last = first + d->width < columns ? first + d->width : columns;
        float sum = 0;
        for (int64_t m = first; m < last; m++) sum += x[m];
        sums[g] = sum;
        for (int64_t l = 0; l < d->words * lookups(d); l++) {
            float *table = tables + (g * d->words * lookups(d) + l) * count;
            table[0] = 0;
            /* Column c doubles the table: minus it below, plus it above. */
            for (int64_t c = 0, half = 1; c < each; c++, half *= 2) {
                int64_t m = first + l * each + c;
                float v = m < last ? x[m] : 0.0f;
                for (int64_t e = 0; e < half; e++) {
                    table[half + e] = table[e] + v;
                    table[e] -= v;
                }
            }
        }
    }
}

/* One block of 32 rows: out[32] = sum over planes and groups of level * lookup sums. */
static void block_product(const delta *d, const float *tables, const float *sums, int64_t block,
                          float *out) {
    int64_t blocks = d->rows / ROWS, groups = d->groups, words = d->words;
    __m256 y[4];
    for (int r = 0; r < 4; r++) y[r] = _mm256_setzero_ps();
    for (int64_t p = 0; p < d->planes; p++) {
        const uint32_t *plane = d->signs + (p * blocks + block) * groups * words * ROWS;
        for (int64_t g = 0; g < groups; g++) {
            __m256 sum[4];
            for (int r = 0; r < 4; r++) sum[r] = _mm256_setzero_ps();
            for (int64_t w = 0; w < words; w++) {
                const uint32_t *word = plane + (g * words + w) * ROWS;
                const float *table = tables + (g * words + w) * 10 * 8;
                __m256i index[4];
                for (int r = 0; r < 4; r++)
                    index[r] = _mm256_loadu_si256((const __m256i *)(word + 8 * r));
                for (int l = 0; l < 10; l++) {
                    __m256 chosen = _mm256_loadu_ps(table + l * 8);
                    for (int r = 0; r < 4; r++) {
                        sum[r] = _mm256_add_ps(sum[r], _mm256_permutevar8x32_ps(chosen, index[r]));
                        index[r] = _mm256_srli_epi32(index[r], 3);
                    }
                }
            }
            const float *level = d->levels + (p * groups + g) * d->rows + block * ROWS;
            for (int r = 0; r < 4; r++)
                y[r] = _mm256_fmadd_ps(_mm256_loadu_ps(level + 8 * r), sum[r], y[r]);
        }
    }
    if (d->offsets)
        for (int64_t g = 0; g < groups; g++) {
            const float *offset = d->offsets + g * d->rows + block * ROWS;
            __m256 sum = _mm256_set1_ps(sums[g]);
            for (int r = 0; r < 4; r++)
                y[r] = _mm256_fmadd_ps(_mm256_loadu_ps(offset + 8 * r), sum, y[r]);
        }
    for (int r = 0; r < 4; r++) _mm256_storeu_ps(out + 8 * r, y[r]);
}

WIDE static void wide_block_product(const delta *d, const float *tables, const float *sums,
                                    int64_t block, float *out) {
    int64_t blocks = d->rows / ROWS, groups = d->groups, words = d->words;
    __m512 y[2];
    for (int r = 0; r < 2; r++) y[r] = _mm512_setzero_ps();
    for (int64_t p = 0; p < d->planes; p++) {
        const uint32_t *plane = d->signs + (p * blocks + block) * groups * words * ROWS;
        for (int64_t g = 0; g < groups; g++) {
            /* Lookups take turns at two sums a register: an add waits for the one before it. */
            __m512 sum[2][2];
            for (int r = 0; r < 2; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
            for (int64_t w = 0; w < words; w++) {
                const uint32_t *word = plane + (g * words + w) * ROWS;
                const float *table = tables + (g * words + w) * 8 * 16;
                __m512i index[2];
                for (int r = 0; r < 2; r++) index[r] = _mm512_loadu_si512(word + 16 * r);
                for (int l = 0; l < 8; l++) {
                    __m512 chosen = _mm512_loadu_ps(table + l * 16);
                    for (int r = 0; r < 2; r++) {
                        __m512 found = _mm512_permutexvar_ps(index[r], chosen);
                        sum[r][l & 1] = _mm512_add_ps(sum[r][l & 1], found);
                        index[r] = _mm512_srli_epi32(index[r], 4);
                    }
                }
            }
            const float *level = d->levels + (p * groups + g) * d->rows + block * ROWS;
            for (int r = 0; r < 2; r++)
                y[r] = _mm512_fmadd_ps(_mm512_loadu_ps(level + 16 * r),
                                       _mm512_add_ps(sum[r][0], sum[r][1]), y[r]);
        }
    }
    if (d->offsets)
        for (int64_t g = 0; g < groups; g++) {
            const float *offset = d->offsets + g * d->rows + block * ROWS;
            __m512 sum = _mm512_set1_ps(sums[g]);
            for (int r = 0; r < 2; r++)
                y[r] = _mm512_fmadd_ps(_mm512_loadu_ps(offset + 16 * r), sum, y[r]);
        }
    for (int r = 0; r < 2; r++) _mm512_storeu_ps(out + 16 * r, y[r]);
}

/* y[token][rows] = x[token][columns] times the transposed delta. `rows` is a multiple of 32, `each` is 3
 * or 4; `scratch` holds groups * (words * lookups * entries + 1) floats. */
void signs_product(const float *x, int64_t tokens, int64_t columns, const uint32_t *signs,
                   const float *levels, const float *offsets, int64_t planes, int64_t groups,
                   int64_t width, int64_t words, int64_t rows, int64_t each, float *scratch, float *y) {
    const delta d = {signs, levels, offsets, planes, groups, width, words, rows, each};
    float *tables = scratch, *sums = scratch + groups * words * lookups(&d) * entries(&d);
    int64_t blocks = rows / ROWS;
    for (int64_t t = 0; t < tokens; t++) {
        fill_tables(&d, x + t * columns, columns, tables, sums);
        /* A thread is worth waking for about a hundred thousand weights. */
#pragma omp parallel for schedule(static) if (planes * rows * columns > 200000)
        for (int64_t b = 0; b < blocks; b++)
            (each == 4 ? wide_block_product : block_product)(&d, tables, sums, b, y + t * rows + b * ROWS);
    }
}

/* Blocks [first, last) of 32 rows as numbers: out[(last - first) * 32][columns] = the delta itself. For
 * many tokens a plain product by these is the faster one. */
void signs_dense(const uint32_t *signs, const float *levels, const float *offsets, int64_t planes,
                 int64_t groups, int64_t width, int64_t words, int64_t rows, int64_t each, int64_t first,
                 int64_t last, int64_t columns, float *out) {
    int64_t blocks = rows / ROWS, used = WORD / each * each;
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i top = _mm256_set1_epi32((int)0x80000000u);
#pragma omp parallel for schedule(static)
    for (int64_t n = first * ROWS; n < last * ROWS; n++) {
        int64_t block = n / ROWS, row = n % ROWS;
        float *target = out + (n - first * ROWS) * columns;
        for (int64_t g = 0; g < groups; g++) {
            int64_t begin = g * width, end = begin + width < columns ? begin + width : columns;
            float offset = offsets ? offsets[g * rows + n] : 0.0f;
            for (int64_t w = 0; w < words; w++) {
                __m256 sum[4];
                for (int i = 0; i < 4; i++) sum[i] = _mm256_set1_ps(offset);
                for (int64_t p = 0; p < planes; p++) {
                    int64_t at = ((p * blocks + block) * groups * words + g * words + w) * ROWS + row;
                    /* A sign bit of 0 is minus. */
                    __m256i word = _mm256_set1_epi32((int)~signs[at]);
                    __m256 level = _mm256_set1_ps(levels[(p * groups + g) * rows + n]);
                    for (int i = 0; i < 4; i++) {
                        __m256i places = _mm256_sub_epi32(_mm256_set1_epi32(31 - 8 * i), lanes);
                        __m256i sign = _mm256_and_si256(_mm256_sllv_epi32(word, places), top);
                        sum[i] = _mm256_add_ps(sum[i], _mm256_xor_ps(level, _mm256_castsi256_ps(sign)));
                    }
                }
                float held[WORD];
                for (int i = 0; i < 4; i++) _mm256_storeu_ps(held + 8 * i, sum[i]);
                int64_t from = begin + w * used, count = end - from < used ? end - from : used;
                for (int64_t m = 0; m < count; m++) target[from + m] = held[m];
            }
        }
    }
}

/* Lays signs out: bit p of fields[n][m] is the sign of plane p. `out` is the words, cleared before. */
void signs_lay(const uint8_t *fields, int64_t planes, int64_t count, int64_t columns, int64_t groups,
               int64_t width, int64_t words, int64_t rows, int64_t each, uint32_t *out) {
    int64_t blocks = rows / ROWS, used = WORD / each * each;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < count; n++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t begin = g * width, end = begin + width < columns ? begin + width : columns;
            for (int64_t w = 0; w < words; w++) {
                int64_t from = begin + w * used, left = end - from < used ? end - from : used;
                if (left <= 0) continue;
                const uint8_t *source = fields + n * columns + from;
                uint8_t some[WORD] = {0};
                if (from + WORD > columns) {
                    __builtin_memcpy(some, source, left);
                    source = some;
                }
                __m256i bytes = _mm256_loadu_si256((const __m256i *)source);
                uint32_t mask = left == 32 ? 0xffffffffu : (1u << left) - 1;
                for (int64_t p = 0; p < planes; p++) {
                    /* Bit p of each byte becomes its highest, which a mask of bytes is made of. */
                    __m256i top = _mm256_sll_epi16(bytes, _mm_cvtsi32_si128((int)(7 - p)));
                    int64_t at = ((p * blocks + n / ROWS) * groups * words + g * words + w) * ROWS;
                    out[at + n % ROWS] = (uint32_t)_mm256_movemask_epi8(top) & mask;
                }
            }
        }
}
