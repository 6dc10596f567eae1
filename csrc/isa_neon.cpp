#define TOKENLOOM_ISA neon
#define TOKENLOOM_ISA_NAME "NEON"
#include "kernels.inl"
