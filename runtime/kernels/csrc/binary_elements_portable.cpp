#define FX_ELEMENTS binary_elements_portable
#include "binary_elements_plain.h"
