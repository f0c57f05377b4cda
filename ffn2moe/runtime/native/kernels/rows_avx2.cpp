#define FFN2MOE_ROWS rows_avx2
#include "rows_generic.h"
