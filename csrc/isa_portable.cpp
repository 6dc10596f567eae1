#define TOKENLOOM_ISA portable
#define TOKENLOOM_ISA_NAME "portable"
#include "kernels.inl"
