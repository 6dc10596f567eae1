#include <initializer_list>

#include "kernels.h"

#if defined(TOKENLOOM_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(TOKENLOOM_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tokenloom {

#if defined(TOKENLOOM_X86)
namespace avx2 { extern const Kernels kernels; }
namespace avx_vnni { extern const Kernels kernels; }
#if defined(TOKENLOOM_AMX)
namespace amx { extern const Kernels kernels; }
#endif
namespace avx512_vnni { extern const Kernels kernels; }
#elif defined(TOKENLOOM_ARM)
namespace neon { extern const Kernels kernels; }
#endif
namespace portable { extern const Kernels kernels; }

#if defined(TOKENLOOM_AMX)
namespace {

// Linux gives a process tiles when it asks for them, before any of its threads uses one; it knows whether the
// processor and the system have them.
bool amx_permitted() {
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25, bf16 = 1u << 22, all = tile | int8 | bf16;
    return (edx & all) == all && syscall(SYS_arch_prctl, request, tile_data) == 0;
}

}  // namespace
#endif

bool head_dim_supported(int head_dim) {
    for (int supported : {8, 16, 32, 64, 80, 96, 128}) {
        if (head_dim == supported) return true;
    }
    return false;
}

const Kernels* const* available_kernels(int* count) {
    static const Kernels* found[5];
    static const int number = [] {
        int n = 0;
#if defined(TOKENLOOM_X86)
        __builtin_cpu_init();
        const bool base = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
        if (base && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
#if defined(TOKENLOOM_AMX)
            if (amx_permitted()) found[n++] = &amx::kernels;
#endif
            found[n++] = &avx512_vnni::kernels;
        }
        if (base && __builtin_cpu_supports("avxvnni")) found[n++] = &avx_vnni::kernels;
        if (base) found[n++] = &avx2::kernels;
#elif defined(TOKENLOOM_ARM)
#if defined(__linux__)
        const unsigned long has = getauxval(AT_HWCAP), wanted = HWCAP_ASIMDDP | HWCAP_ASIMDHP;
        if ((has & wanted) == wanted) found[n++] = &neon::kernels;
#else
        found[n++] = &neon::kernels;  // all of Apple's have the dot product
#endif
#endif
        found[n++] = &portable::kernels;
        return n;
    }();
    *count = number;
    return found;
}

}  // namespace tokenloom
