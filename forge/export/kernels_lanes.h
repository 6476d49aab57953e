// One instruction set's kernels: kernels.cpp reads this file once for each, with LANES, TARGET and HERE set.
//
// Names follow ggml-quants.c, and so does the order of every operation within a lane. `kept_iscale` (and
// `kept_min`) stand for ggml's array L: the values that its best try gave are computed again where needed.

namespace HERE {

typedef float floats __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), may_alias));

TARGET static inline floats absolute(floats value) { return (floats)((ints)value & 0x7fffffff); }

// ggml's nearest_int, clamped. The bits are taken as ggml takes them: where a value is out of range or not
// a number, that is what decides the byte.
TARGET static inline floats level(floats value, int low, int high) {
    const ints lowest = ints{} + low, highest = ints{} + high;
    ints found = ((ints)(value + 12582912.f) & 0x007fffff) - 0x00400000;
    found = found < highest ? found : highest;
    found = found > lowest ? found : lowest;
    return __builtin_convertvector(found, floats);
}

TARGET static inline int level(float value, int low, int high) {
    const int found = nearest_int(value);
    return found < low ? low : found > high ? high : found;
}

// Value i of every sub-block, side by side; lanes past `count` repeat the first.
template <int SIZE> TARGET static inline void load(const float *x, int count, floats *lanes) {
    float *out = (float *)lanes;
    for (int lane = 0; lane < LANES; ++lane) {
        const float *source = x + (lane < count ? lane : 0) * SIZE;
        for (int i = 0; i < SIZE; ++i) out[i * LANES + lane] = source[i];
    }
}

struct Q4 {
    alignas(64) float scale[GROUP], min[GROUP], kept_iscale[GROUP], kept_min[GROUP];
};

// make_qkx2_quants(32, 15, x, weights, ..., -1.f, 0.1f, 20, false) of LANES sub-blocks.
TARGET static inline void search_q4(const float *source, int count, Q4 &found, int first) {
    floats x[32], weights[32], l[32], sum_x2 = {}, av_x;
    load<32>(source, count, x);
    for (int i = 0; i < 32; ++i) sum_x2 += x[i] * x[i];
    sum_x2 /= 32;
    for (int lane = 0; lane < LANES; ++lane) av_x[lane] = __builtin_sqrtf(sum_x2[lane]);
    for (int i = 0; i < 32; ++i) weights[i] = av_x + absolute(x[i]);

    floats min = x[0], max = x[0], sum_w = weights[0], sum_x = sum_w * x[0];
    for (int i = 1; i < 32; ++i) {
        min = x[i] < min ? x[i] : min;
        max = x[i] > max ? x[i] : max;
        sum_w += weights[i];
        sum_x += weights[i] * x[i];
    }
    min = min > 0 ? floats{} : min;
    const ints flat = max == min;
    const floats flat_min = min;
    floats kept_iscale = 15 / (max - min), kept_min = min, scale = 1 / kept_iscale, best_error = {};
    for (int i = 0; i < 32; ++i) {
        const floats diff = scale * level(kept_iscale * (x[i] - min), 0, 15) + min - x[i];
        best_error += weights[i] * (diff * diff);
    }
    for (int step = 0; step <= 20; ++step) {
        const floats iscale = (-1.f + 0.1f * step + 15) / (max - min);
        floats sum_l = {}, sum_l2 = {}, sum_xl = {};
        for (int i = 0; i < 32; ++i) {
            l[i] = level(iscale * (x[i] - min), 0, 15);
            const floats wl = weights[i] * l[i];
            sum_l += wl;
            sum_l2 += wl * l[i];
            sum_xl += wl * x[i];
        }
        const floats D = sum_w * sum_l2 - sum_l * sum_l;
        floats this_scale = (sum_w * sum_xl - sum_x * sum_l) / D;
        floats this_min = (sum_l2 * sum_x - sum_l * sum_xl) / D;
        this_scale = this_min > 0 ? sum_xl / sum_l2 : this_scale;
        this_min = this_min > 0 ? floats{} : this_min;
        floats error = {};
        for (int i = 0; i < 32; ++i) {
            const floats diff = this_scale * l[i] + this_min - x[i];
            error += weights[i] * (diff * diff);
        }
        const ints better = (D > 0) & (error < best_error);
        kept_iscale = better ? iscale : kept_iscale;
        kept_min = better ? min : kept_min;
        best_error = better ? error : best_error;
        scale = better ? this_scale : scale;
        min = better ? this_min : min;
    }
    *(floats *)(found.scale + first) = flat ? floats{} : scale;
    *(floats *)(found.min + first) = flat ? -flat_min : -min;
    *(floats *)(found.kept_iscale + first) = flat ? floats{} : kept_iscale;
    *(floats *)(found.kept_min + first) = flat ? flat_min : kept_min;
}

// The rest of quantize_row_q4_K_ref: `scales` and the others hold a block's eight sub-blocks.
TARGET static inline void finish_q4(
    const float *x, const float *scales, const float *mins, const float *iscales, const float *kept, uint8_t *y
) {
    float max_scale = 0, max_min = 0;
    for (int j = 0; j < 8; ++j) {
        if (scales[j] > max_scale) max_scale = scales[j];
        if (mins[j] > max_min) max_min = mins[j];
    }
    const float inv_scale = max_scale > 0 ? 63.f / max_scale : 0.f, inv_min = max_min > 0 ? 63.f / max_min : 0.f;
    const uint16_t halves[2] = {to_half(max_scale / 63.f), to_half(max_min / 63.f)};
    memcpy(y, halves, 4);
    uint8_t L[256], *packed = y + 4;
    for (int j = 0; j < 8; ++j) {
        uint8_t ls = nearest_int(inv_scale * scales[j]), lm = nearest_int(inv_min * mins[j]);
        ls = ls < 63 ? ls : 63;
        lm = lm < 63 ? lm : 63;
        if (j < 4) {
            packed[j] = ls;
            packed[j + 4] = lm;
        } else {
            packed[j + 4] = (ls & 0xF) | ((lm & 0xF) << 4);
            packed[j - 4] |= (ls >> 4) << 6;
            packed[j] |= (lm >> 4) << 6;
        }
        const float d = from_half(halves[0]) * ls, dm = from_half(halves[1]) * lm;
        for (int i = 32 * j; i < 32 * j + 32; ++i) {
            L[i] = level(d ? (x[i] + dm) / d : iscales[j] * (x[i] - kept[j]), 0, 15);
        }
    }
    for (int j = 0; j < 4; ++j) {
        for (int i = 0; i < 32; ++i) y[16 + 32 * j + i] = L[64 * j + i] | (L[64 * j + 32 + i] << 4);
    }
}

TARGET static void q4_K(const float *x, uint8_t *y, int64_t blocks) {
    Q4 found;
    for (int64_t done = 0; done < blocks; done += 2, x += 512, y += 2 * 144) {
        const int here = blocks - done < 2 ? 1 : 2;
        for (int first = 0; first < 8 * here; first += LANES) {
            search_q4(x + 32 * first, 8 * here - first, found, first);
        }
        for (int b = 0; b < here; ++b) {
            finish_q4(
                x + 256 * b, found.scale + 8 * b, found.min + 8 * b, found.kept_iscale + 8 * b,
                found.kept_min + 8 * b, y + 144 * b
            );
        }
    }
}

struct Q6 {
    alignas(64) float scale[GROUP], kept_iscale[GROUP];
    alignas(64) int32_t used[GROUP];
};

// make_qx_quants(16, 32, x, ..., 1, NULL) of LANES sub-blocks.
TARGET static inline void search_q6(const float *source, Q6 &found, int first) {
    floats x[16], max = {}, amax = {};
    load<16>(source, LANES, x);
    for (int i = 0; i < 16; ++i) {
        const floats ax = absolute(x[i]);
        max = ax > amax ? x[i] : max;
        amax = ax > amax ? ax : amax;
    }
    const ints empty = amax < GROUP_MAX_EPS;
    floats kept_iscale = {}, scale = {}, best = {};
    for (int step = -10; step <= 9; ++step) {
        // ggml tries the whole range first, and then the steps without the one in the middle.
        if (step == 0) continue;
        const bool is_first = step == -10;
        const floats iscale = (is_first ? -32.f : -(32 + 0.1f * step)) / max;
        floats sumlx = {}, suml2 = {};
        for (int i = 0; i < 16; ++i) {
            const floats l = level(iscale * x[i], -32, 31), w = x[i] * x[i];
            sumlx += w * x[i] * l;
            suml2 += w * l * l;
        }
        const floats this_scale = sumlx / suml2;
        if (is_first) {
            kept_iscale = iscale;
            scale = suml2 != 0 ? this_scale : floats{};
            best = scale * sumlx;
            continue;
        }
        const ints better = (suml2 > 0) & (sumlx * sumlx > best * suml2);
        kept_iscale = better ? iscale : kept_iscale;
        scale = better ? this_scale : scale;
        best = better ? this_scale * sumlx : best;
    }
    *(floats *)(found.scale + first) = empty ? floats{} : scale;
    *(floats *)(found.kept_iscale + first) = kept_iscale;
    *(ints *)(found.used + first) = ~empty;
}

// The rest of quantize_row_q6_K_ref.
TARGET static inline void finish_q6(const float *x, const Q6 &found, uint8_t *y) {
    float max_scale = 0, max_abs_scale = 0;
    for (int j = 0; j < 16; ++j) {
        const float abs_scale = __builtin_fabsf(found.scale[j]);
        if (abs_scale > max_abs_scale) {
            max_abs_scale = abs_scale;
            max_scale = found.scale[j];
        }
    }
    if (max_abs_scale < GROUP_MAX_EPS) {
        memset(y, 0, 210);
        return;
    }
    const float iscale = -128.f / max_scale;
    const uint16_t half = to_half(1 / iscale);
    memcpy(y + 208, &half, 2);
    uint8_t L[256];
    for (int j = 0; j < 16; ++j) {
        const int nearest = nearest_int(iscale * found.scale[j]);
        const int8_t sub_scale = nearest < 127 ? nearest : 127;
        y[192 + j] = sub_scale;
        const float d = from_half(half) * sub_scale;
        const int used = d ? -1 : found.used[j];
        for (int i = 16 * j; i < 16 * j + 16; ++i) {
            L[i] = (level(d ? x[i] / d : found.kept_iscale[j] * x[i], -32, 31) + 32) & used;
        }
    }
    for (int j = 0; j < 2; ++j) {
        const uint8_t *q = L + 128 * j;
        for (int i = 0; i < 32; ++i) {
            y[64 * j + i] = (q[i] & 0xF) | (q[i + 64] << 4);
            y[64 * j + 32 + i] = (q[i + 32] & 0xF) | (q[i + 96] << 4);
            y[128 + 32 * j + i] =
                (q[i] >> 4) | (q[i + 32] >> 4 << 2) | (q[i + 64] >> 4 << 4) | (q[i + 96] >> 4 << 6);
        }
    }
}

TARGET static void q6_K(const float *x, uint8_t *y, int64_t blocks) {
    Q6 found;
    for (int64_t done = 0; done < blocks; ++done, x += 256, y += 210) {
        for (int first = 0; first < GROUP; first += LANES) search_q6(x + 16 * first, found, first);
        finish_q6(x, found, y);
    }
}

}  // namespace HERE

#undef LANES
#undef TARGET
#undef HERE
