#define FX_ELEMENTS binary_elements_avx512
#include "binary_elements_plain.h"
