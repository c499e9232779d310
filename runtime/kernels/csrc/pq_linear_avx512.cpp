// AVX-512 with VBMI and VNNI: tables live in registers, indices are the operands of byte and word permutations.
//
// LANES (K <= 32): a 32-bit lane is one output. vpermps and vpermt2ps look at the lowest 4 and 5 bits of a lane only, so
// float32 tables need one shift per look-up. For integers, four sub-spaces of an output are put side by side in the four
// bytes of its lane, each with the number of its table in the bits above the index; vpermb (K = 16: four tables in one
// register) or vpermt2b (K = 32: in two) looks all of them up, and vpdpbusd with ones adds the four entries to 32 bits.
// ROWS (K >= 64): a byte is one output, a register (two, four) one table. Entries are added in 16 bits: whole registers to
// one sum, their upper bytes to another; 256 entries fit before both go to 32 bits.
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

#include "pq_linear_lanes_avx512.h"
#include "pq_linear_rows_avx512.h"

namespace fx {
namespace {

bool knows(const Layout& layout, int) { return layout.id == LANES || (layout.id == ROWS && layout.codewords >= 64); }

void look_up(const PqLookUp& job, int64_t begin, int64_t end) {
    if (job.layout->id == LANES) return look_up_lanes(job, begin, end);
    switch (job.layout->codewords) {
        case 64: return look_up_rows<64>(job, begin, end);
        case 128: return look_up_rows<128>(job, begin, end);
        default: return look_up_rows<256>(job, begin, end);
    }
}

}  // namespace

const PqLinearKernels pq_linear_avx512 = {knows, packed_bytes, build, pack, look_up};

}  // namespace fx

#endif
