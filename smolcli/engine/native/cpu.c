/* Detects the kernel variants that the CPU and the operating system support. Compiled for the baseline
   of the architecture, so that it runs everywhere. */

#include <stdint.h>

#include "team.h" /* EXPORT */

EXPORT const char smol_source[] = "smol-source-" SOURCE_HASH;

/* Bits of the result of smol_cpu_variants: variants, and instructions for dot products of bytes. The same
   as those of VARIANTS in library.py. */
enum { X86_64_V3 = 1, X86_64_V4 = 2, X86_64_V4_BF16 = 4, AARCH64 = 8, AARCH64_BF16 = 16 };
enum { AVX_VNNI = 32, AVX512_VNNI = 64, DOTPROD = 128 };

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>

static int has_all(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

/* XCR0: the register states that the operating system saves and restores. */
static uint64_t saved_states(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | (uint64_t)high << 32;
}

EXPORT int smol_cpu_variants(void) {
    enum { AVX_STATES = 0x6, AVX512_STATES = 0xe6 }; /* of XCR0 */
    /* CPUID leaf 1, ecx */
    const uint32_t fma = 1u << 12, movbe = 1u << 22, xsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    /* Leaf 7, ebx; lzcnt: leaf 0x80000001, ecx */
    const uint32_t bmi1 = 1u << 3, avx2 = 1u << 5, bmi2 = 1u << 8, lzcnt = 1u << 5;
    const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31; /* F DQ CD BW VL */
    const uint32_t avx512_vnni = 1u << 11;                    /* leaf 7, ecx */
    const uint32_t avx_vnni = 1u << 4, avx512_bf16 = 1u << 5; /* leaf 7, subleaf 1, eax */
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has_all(ecx, fma | movbe | xsave | avx | f16c)) return 0;
    uint64_t states = saved_states();
    if ((states & AVX_STATES) != AVX_STATES) return 0;
    if (!__get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) || !has_all(ecx, lzcnt)) return 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !has_all(ebx, bmi1 | avx2 | bmi2)) return 0;
    int has_avx512 = has_all(ebx, avx512) && (states & AVX512_STATES) == AVX512_STATES;
    int found = X86_64_V3 | (has_avx512 ? X86_64_V4 : 0);
    if (has_avx512 && has_all(ecx, avx512_vnni)) found |= AVX512_VNNI;
    if (eax < 1 /* subleaves */ || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return found;
    if (has_all(eax, avx_vnni)) found |= AVX_VNNI;
    if (has_avx512 && has_all(eax, avx512_bf16)) found |= X86_64_V4_BF16;
    return found;
}

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>

static int has_feature(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, 0, 0) == 0 && value;
}
#endif

EXPORT int smol_cpu_variants(void) {
    int found = AARCH64;
#if defined(__linux__)
    const unsigned long hwcap2_bf16 = 1ul << 14, hwcap_dotprod = 1ul << 20;
    if (getauxval(AT_HWCAP) & hwcap_dotprod) found |= DOTPROD;
    if (getauxval(AT_HWCAP2) & hwcap2_bf16) found |= AARCH64_BF16;
#elif defined(__APPLE__)
    if (has_feature("hw.optional.arm.FEAT_DotProd")) found |= DOTPROD;
    if (has_feature("hw.optional.arm.FEAT_BF16")) found |= AARCH64_BF16;
#endif
    return found;
}

#else
EXPORT int smol_cpu_variants(void) { return 0; }
#endif
