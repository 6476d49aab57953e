// Q4_K and Q6_K without an importance matrix, byte for byte as ggml-quants.c quantizes them, several times as
// fast: the search for a scale runs for 16 sub-blocks (8 with AVX2, 4 elsewhere) side by side in SIMD lanes.
//
// Follows quantize_row_q4_K_ref and quantize_row_q6_K_ref of llama.cpp, commit 0c1e57098 (MIT licence,
// Copyright (c) 2023-2026 The ggml authors). Compile with -ffp-contract=off: a product fused with a sum is
// rounded once instead of twice, which changes bytes. x86-64 and others, GCC and Clang.

#include <stdint.h>
#include <string.h>

#define GROUP 16  // sub-blocks searched together: two blocks of Q4_K, one of Q6_K
#define GROUP_MAX_EPS 1e-15f

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline int nearest_int(float value) {
    return (int)(as_bits(value + 12582912.f) & 0x007fffff) - 0x00400000;
}

static inline uint16_t to_half(float value) {
    const uint32_t bits = as_bits(value), shifted = bits + bits;
    uint32_t bias = shifted & 0xFF000000u;
    if (bias < 0x71000000u) bias = 0x71000000u;
    const float base = (__builtin_fabsf(value) * 0x1.0p+112f) * 0x1.0p-110f;
    const uint32_t rounded = as_bits(as_float((bias >> 1) + 0x07800000u) + base);
    const uint32_t exponent_and_mantissa = ((rounded >> 13) & 0x7C00u) + (rounded & 0x0FFFu);
    return (bits >> 16 & 0x8000u) | (shifted > 0xFF000000u ? 0x7E00u : exponent_and_mantissa);
}

static inline float from_half(uint16_t half) {
    const uint32_t shifted = (uint32_t)half << 17, sign = (uint32_t)(half & 0x8000u) << 16;
    const float normal = as_float((shifted >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const float subnormal = as_float((shifted >> 17) | (126u << 23)) - 0.5f;
    return as_float(sign | as_bits(shifted < (1u << 27) ? subnormal : normal));
}

#if defined(__x86_64__)
#define HERE avx512
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#include "kernels_lanes.h"

#define HERE avx2
#define LANES 8
#define TARGET __attribute__((target("avx2")))
#include "kernels_lanes.h"
#endif

#define HERE plain
#define LANES 4
#define TARGET
#include "kernels_lanes.h"

#if defined(__x86_64__)
#define HAS(feature) __builtin_cpu_supports(feature)
#define CALL(kernel)                                                                                     \
    __builtin_cpu_init();                                                                                \
    if (lanes >= 16 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl"))          \
        return avx512::kernel(x, y, blocks);                                                             \
    if (lanes >= 8 && HAS("avx2")) return avx2::kernel(x, y, blocks);                                    \
    return plain::kernel(x, y, blocks)
#else
#define CALL(kernel) return plain::kernel(x, y, blocks)
#endif

// `x`: 256 floats a block; `y`: 144 bytes a block of Q4_K, 210 of Q6_K; `lanes`: the most to use, for tests.
extern "C" void quantize_q4_K(const float *x, uint8_t *y, int64_t blocks, int lanes) { CALL(q4_K); }
extern "C" void quantize_q6_K(const float *x, uint8_t *y, int64_t blocks, int lanes) { CALL(q6_K); }
