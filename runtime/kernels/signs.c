/* Products with sign planes on x86 CPUs that have AVX2.
 *
 * Three columns of signs choose one of eight partial sums +-x0 +-x1 +-x2. Eight floats fill one
 * register, so a single permute looks up the sum of three columns for eight rows at once; one add and
 * one shift complete it: three instructions for 24 weights. The lookup-table idea follows T-MAC (Wei
 * et al., arXiv 2407.00088); here the tables are float32, so that nothing is rounded on the way.
 *
 * Layout. Rows go in blocks of 32 (four registers of eight rows). A group of columns that share a scale
 * takes `words` 32-bit words a row; each word holds ten lookups of three columns, lowest bits first;
 * the columns that pad a group meet zeros in the table. `signs[plane][block][group * words + w][32]`.
 */
#include <immintrin.h>
#include <stdint.h>

enum { ROWS = 32, LOOKUPS = 10, COLUMNS = 3, ENTRIES = 8 };

int signs_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

/* Tables of one token: float [groups][words * LOOKUPS][ENTRIES]; group sums: float [groups]. */
static void fill_tables(const float *x, int64_t columns, int64_t groups, int64_t width, int64_t words,
                        float *tables, float *sums) {
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = g * width, last = first + width < columns ? first + width : columns;
        float sum = 0;
        for (int64_t m = first; m < last; m++) sum += x[m];
        sums[g] = sum;
        for (int64_t l = 0; l < words * LOOKUPS; l++) {
            float v[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) {
                int64_t m = first + l * COLUMNS + c;
                v[c] = m < last ? x[m] : 0.0f;
            }
            float *table = tables + (g * words * LOOKUPS + l) * ENTRIES;
            for (int e = 0; e < ENTRIES; e++)
                table[e] = (e & 1 ? v[0] : -v[0]) + (e & 2 ? v[1] : -v[1]) + (e & 4 ? v[2] : -v[2]);
        }
    }
}

/* One block of 32 rows: out[32] = sum over planes and groups of level * lookup sums. */
static void block_product(const float *tables, const float *sums, const uint32_t *signs,
                          const float *levels, const float *offsets, int64_t planes, int64_t groups,
                          int64_t words, int64_t rows, int64_t block, int64_t blocks, float *out) {
    __m256 y[4];
    for (int r = 0; r < 4; r++) y[r] = _mm256_setzero_ps();
    for (int64_t p = 0; p < planes; p++) {
        const uint32_t *plane = signs + (p * blocks + block) * groups * words * ROWS;
        for (int64_t g = 0; g < groups; g++) {
            __m256 sum[4];
            for (int r = 0; r < 4; r++) sum[r] = _mm256_setzero_ps();
            for (int64_t w = 0; w < words; w++) {
                const uint32_t *word = plane + (g * words + w) * ROWS;
                const float *table = tables + (g * words + w) * LOOKUPS * ENTRIES;
                __m256i index[4];
                for (int r = 0; r < 4; r++)
                    index[r] = _mm256_loadu_si256((const __m256i *)(word + 8 * r));
                for (int l = 0; l < LOOKUPS; l++) {
                    __m256 entries = _mm256_loadu_ps(table + l * ENTRIES);
                    for (int r = 0; r < 4; r++) {
                        sum[r] = _mm256_add_ps(sum[r], _mm256_permutevar8x32_ps(entries, index[r]));
                        index[r] = _mm256_srli_epi32(index[r], COLUMNS);
                    }
                }
            }
            const float *level = levels + (p * groups + g) * rows + block * ROWS;
            for (int r = 0; r < 4; r++)
                y[r] = _mm256_fmadd_ps(_mm256_loadu_ps(level + 8 * r), sum[r], y[r]);
        }
    }
    if (offsets)
        for (int64_t g = 0; g < groups; g++) {
            const float *offset = offsets + g * rows + block * ROWS;
            __m256 sum = _mm256_set1_ps(sums[g]);
            for (int r = 0; r < 4; r++)
                y[r] = _mm256_fmadd_ps(_mm256_loadu_ps(offset + 8 * r), sum, y[r]);
        }
    for (int r = 0; r < 4; r++) _mm256_storeu_ps(out + 8 * r, y[r]);
}

/* y[token][rows] = x[token][columns] times the transposed delta. `rows` is a multiple of 32; `scratch`
 * holds groups * words * LOOKUPS * ENTRIES + groups floats. */
void signs_product(const float *x, int64_t tokens, int64_t columns, const uint32_t *signs,
                   const float *levels, const float *offsets, int64_t planes, int64_t groups,
                   int64_t width, int64_t words, int64_t rows, float *scratch, float *y) {
    float *tables = scratch, *sums = scratch + groups * words * LOOKUPS * ENTRIES;
    int64_t blocks = rows / ROWS;
    for (int64_t t = 0; t < tokens; t++) {
        fill_tables(x + t * columns, columns, groups, width, words, tables, sums);
        /* A thread is worth waking for about a hundred thousand weights. */
#pragma omp parallel for schedule(static) if (planes * rows * columns > 200000)
        for (int64_t b = 0; b < blocks; b++)
            block_product(tables, sums, signs, levels, offsets, planes, groups, words, rows, b, blocks,
                          y + t * rows + b * ROWS);
    }
}
