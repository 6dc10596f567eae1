#define TOKENLOOM_ISA avx_vnni
#define TOKENLOOM_ISA_NAME "AVX-VNNI"
#include "kernels.inl"
