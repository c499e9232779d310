#define FX_ELEMENTS binary_elements_avx2
#include "binary_elements_plain.h"
