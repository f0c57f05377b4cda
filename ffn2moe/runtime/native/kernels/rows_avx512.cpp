#define FFN2MOE_ROWS rows_avx512
#include "rows_generic.h"
