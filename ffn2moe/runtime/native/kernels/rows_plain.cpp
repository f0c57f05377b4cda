#define FFN2MOE_ROWS rows_plain
#include "rows_generic.h"
