#define TOKENLOOM_ISA amx
#define TOKENLOOM_ISA_NAME "AVX512-VNNI+AMX"
#include "kernels.inl"
