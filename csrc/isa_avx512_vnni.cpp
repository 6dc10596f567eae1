#define TOKENLOOM_ISA avx512_vnni
#define TOKENLOOM_ISA_NAME "AVX512-VNNI"
#include "kernels.inl"
