#include "binary_elements_plain.h"

namespace fx {

const BinaryElements binary_elements_avx2 = PLAIN;

}  // namespace fx
