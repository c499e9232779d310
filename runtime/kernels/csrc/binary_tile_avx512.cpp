// Convolution by tables: sums of a few pixels and 64 outputs in registers.
//
// A look-up is one instruction for 64 outputs, and so is its addition, in bytes. After as many as fit a byte, the sums are
// widened to words: three instructions, because the even bytes are not taken apart from the odd ones before the end.
#include "binary_table_avx512.h"

namespace fx {
namespace table {
namespace {

FX_INLINE __m512i added(__m512i sum, __m512i index, __m512i table) {
    return _mm512_add_epi8(sum, _mm512_permutexvar_epi8(index, table));
}

FX_INLINE __m512i added(__m512i sum, const uint8_t* index, const uint8_t* table) {
    return added(sum, _mm512_loadu_si512(index), _mm512_load_si512(table));
}

// -- three taps side by side -------------------------------------------------------------------------------------------

// A table is loaded once and serves the three columns that it lies under. Of the tables 0 to COLUMNS + 1 the first and the
// last serve one, and lie in the padding for a tile at the edge.

#if defined(__GNUC__)
// The order of instructions matters: on Zen 4 two look-ups followed by two additions go to different ports, 3.6 pairs a
// nanosecond, and one after the other get into each other's way, 2.9. A compiler mixes them, copies sums, and reads tables
// from memory again. Registers 24 to 26 are the weights of the left, middle and right tap, 27 and 28 tables, and 30 and
// 31 what is looked up; operands are the sums.
#define FX_TABLE(PLACE, REGISTER) "vmovdqa64 64*" PLACE "(%[tables]), %%zmm" REGISTER "\n\t"
#define FX_LOOK_UP(TABLE, TAP, TO) "vpermb %%zmm" TABLE ", %%zmm" TAP ", %%zmm" TO "\n\t"
#define FX_ADD(FROM, SUM) "vpaddb %%zmm" FROM ", %" SUM ", %" SUM "\n\t"
#define FX_ONE(T1, TAP1, SUM1) FX_LOOK_UP(T1, TAP1, "30") FX_ADD("30", SUM1)
#define FX_PAIR(T1, TAP1, SUM1, T2, TAP2, SUM2) \
    FX_LOOK_UP(T1, TAP1, "30") FX_LOOK_UP(T2, TAP2, "31") FX_ADD("30", SUM1) FX_ADD("31", SUM2)
#define FX_LEFT "24"
#define FX_MIDDLE "25"
#define FX_RIGHT "26"
// table 1, without its right tap
#define FX_BEGIN FX_TABLE("1", "27") FX_PAIR("27", FX_MIDDLE, "0", "27", FX_LEFT, "1")
// tables C and C + 1, A = C - 2 and so on
#define FX_TWO(A, B, C, D) \
    FX_TABLE(C, "27") FX_TABLE(D, "28") FX_PAIR("27", FX_RIGHT, A, "27", FX_MIDDLE, B) \
    FX_PAIR("27", FX_LEFT, C, "28", FX_RIGHT, B) FX_PAIR("28", FX_MIDDLE, C, "28", FX_LEFT, D)
// the last table but one, without its left tap; the two before it, of an odd number of columns
#define FX_END(A, B, C) FX_TABLE(C, "27") FX_PAIR("27", FX_RIGHT, A, "27", FX_MIDDLE, B)
#define FX_ODD_END(A, B, C, D) \
    FX_TABLE(C, "27") FX_TABLE(D, "28") FX_PAIR("27", FX_RIGHT, A, "27", FX_MIDDLE, B) \
    FX_PAIR("27", FX_LEFT, C, "28", FX_RIGHT, B) FX_ONE("28", FX_MIDDLE, C)
#define FX_RUN(CODE, ...) \
    asm volatile("vmovdqu64 (%[weights]), %%zmm24\n\tvmovdqu64 64(%[weights]), %%zmm25\n\t" \
                 "vmovdqu64 128(%[weights]), %%zmm26\n\t" CODE \
                 : __VA_ARGS__ \
                 : [tables] "r"(tables), [weights] "r"(weights) \
                 : "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm30", "xmm31")
#define FX_S(C) "+v"(sum[C])

template <int COLUMNS>
FX_INLINE void add_inner(__m512i* sum, const uint8_t* tables, const uint8_t* weights) {
    if constexpr (COLUMNS == 1) FX_RUN(FX_TABLE("1", "27") FX_ONE("27", FX_MIDDLE, "0"), FX_S(0));
    if constexpr (COLUMNS == 2) FX_RUN(FX_BEGIN FX_END("0", "1", "2"), FX_S(0), FX_S(1));
    if constexpr (COLUMNS == 3) FX_RUN(FX_BEGIN FX_ODD_END("0", "1", "2", "3"), FX_S(0), FX_S(1), FX_S(2));
    if constexpr (COLUMNS == 4)
        FX_RUN(FX_BEGIN FX_TWO("0", "1", "2", "3") FX_END("2", "3", "4"), FX_S(0), FX_S(1), FX_S(2), FX_S(3));
    if constexpr (COLUMNS == 5)
        FX_RUN(FX_BEGIN FX_TWO("0", "1", "2", "3") FX_ODD_END("2", "3", "4", "5"), FX_S(0), FX_S(1), FX_S(2), FX_S(3),
               FX_S(4));
    if constexpr (COLUMNS == 6)
        FX_RUN(FX_BEGIN FX_TWO("0", "1", "2", "3") FX_TWO("2", "3", "4", "5") FX_END("4", "5", "6"), FX_S(0), FX_S(1),
               FX_S(2), FX_S(3), FX_S(4), FX_S(5));
    if constexpr (COLUMNS == 7)
        FX_RUN(FX_BEGIN FX_TWO("0", "1", "2", "3") FX_TWO("2", "3", "4", "5") FX_ODD_END("4", "5", "6", "7"), FX_S(0),
               FX_S(1), FX_S(2), FX_S(3), FX_S(4), FX_S(5), FX_S(6));
    if constexpr (COLUMNS == 8)
        FX_RUN(FX_BEGIN FX_TWO("0", "1", "2", "3") FX_TWO("2", "3", "4", "5") FX_TWO("4", "5", "6", "7")
                   FX_END("6", "7", "8"),
               FX_S(0), FX_S(1), FX_S(2), FX_S(3), FX_S(4), FX_S(5), FX_S(6), FX_S(7));
}

// The left tap of the first table, the right one of the last.
template <int COLUMNS>
FX_INLINE void add_edges(__m512i* sum, const Tile& tile, const uint8_t* tables, const uint8_t* weights) {
    const uint8_t* const last = tables + 64 * (COLUMNS + 1);
    if (!tile.left) sum[0] = added(sum[0], weights, tables);
    if (!tile.right) sum[COLUMNS - 1] = added(sum[COLUMNS - 1], weights + 128, last);
}
#endif

template <int COLUMNS>
FX_INLINE void add_three(__m512i (&sum)[COLUMNS], const Tile& tile, const uint8_t* tables, const uint8_t* weights) {
#if defined(__GNUC__)
    add_inner<COLUMNS>(sum, tables, weights);
    add_edges<COLUMNS>(sum, tile, tables, weights);
#else
    for (int c = 0; c < COLUMNS + 2; c++) {
        if ((c == 0 && tile.left) || (c == COLUMNS + 1 && tile.right)) continue;
        for (int kx = 0; kx < 3; kx++)
            if (c - kx >= 0 && c - kx < COLUMNS) sum[c - kx] = added(sum[c - kx], weights + 64 * kx, tables + 64 * c);
    }
#endif
}

// -- any taps ------------------------------------------------------------------------------------------------------------

template <int COLUMNS>
FX_INLINE void add_each(__m512i (&sum)[COLUMNS], const Tile& tile, const uint8_t* tables, const uint8_t* weights) {
    for (int64_t kx = 0; kx < tile.kw; kx++, tables += tile.tap_bytes, weights += 64) {
        const __m512i index = _mm512_loadu_si512(weights);
        FX_UNROLL
        for (int c = 0; c < COLUMNS; c++) sum[c] = added(sum[c], index, _mm512_load_si512(tables + c * tile.column_bytes));
    }
}

// -- a tile --------------------------------------------------------------------------------------------------------------

template <int COLUMNS, bool THREE>
void run(const Tile& tile) {
    __m512i all[COLUMNS], odd[COLUMNS];
    __m512i* const sums = reinterpret_cast<__m512i*>(tile.sums);
    FX_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        all[c] = tile.begins ? _mm512_setzero_si512() : _mm512_load_si512(sums + 2 * c);
        odd[c] = tile.begins ? _mm512_setzero_si512() : _mm512_load_si512(sums + 2 * c + 1);
    }
    for (int64_t ky = 0; ky < tile.rows; ky++) {
        __m512i sum[COLUMNS];
        FX_UNROLL
        for (int c = 0; c < COLUMNS; c++) sum[c] = _mm512_setzero_si512();
        const uint8_t *tables = tile.tables + tile.table_row[ky], *weights = tile.weights + tile.weight_row[ky];
        for (int64_t group = 0; group < tile.groups; group++) {
            if (THREE) add_three(sum, tile, tables, weights);
            else add_each(sum, tile, tables, weights);
            tables += tile.group_bytes, weights += tile.kw * 64;
        }
        FX_UNROLL
        for (int c = 0; c < COLUMNS; c++) {
            all[c] = _mm512_add_epi16(all[c], sum[c]);
            odd[c] = _mm512_add_epi16(odd[c], _mm512_srli_epi16(sum[c], 8));
        }
    }
    FX_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        _mm512_store_si512(sums + 2 * c, all[c]);
        _mm512_store_si512(sums + 2 * c + 1, odd[c]);
    }
}

template <bool THREE>
TileFunction* of_columns(int64_t columns) {
    static constexpr TileFunction* FUNCTIONS[MOST_COLUMNS] = {run<1, THREE>, run<2, THREE>, run<3, THREE>,
                                                              run<4, THREE>, run<5, THREE>, run<6, THREE>,
                                                              run<7, THREE>, run<8, THREE>};
    return FUNCTIONS[columns - 1];
}

}  // namespace

TileFunction* tile_function(int64_t columns, bool three) {
    return three ? of_columns<true>(columns) : of_columns<false>(columns);
}

}  // namespace table
}  // namespace fx
