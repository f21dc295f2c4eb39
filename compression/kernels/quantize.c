/* Round-to-nearest integer quantization of rows of weights in one pass over memory: packed codes, scales, zero points
 * and sums of squares, bit for bit what quantization/affine.py and quantization/compressed_tensors.py make of the rows.
 *
 * Plain loops that a compiler turns into vector code by itself. What looks odd (ranges found on bit patterns, rounding
 * by adding 1.5 * 2^23, sums in lanes) lets it do so without -ffast-math: every compiler and processor gives the same
 * bits. Build with -ffp-contract=off: a fused multiply-add rounds once where two roundings are meant.
 */
#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0
#error "rounding is part of the result: build for float32 arithmetic, without -ffast-math"
#endif
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "weights of checkpoints are little-endian, and so are the streams that are written here"
#endif

/* The best of several versions is chosen when the library is loaded; else there is one, for the oldest processor. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(ONE_VERSION)
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif
#define INLINE static inline __attribute__((always_inline)) /* so that dtype and the like are constants in each copy */

/* Weights lie anywhere in a file, at odd addresses, too. */
typedef uint16_t __attribute__((aligned(1), may_alias)) u16;
typedef uint32_t __attribute__((aligned(1), may_alias)) u32;
typedef uint64_t __attribute__((aligned(1), may_alias)) u64;

enum { BF16, F16, F32 };     /* dtypes */
enum { PACKED, CODE_BYTES }; /* layouts: dense streams of codes; bytes, codes less the middle one; as in __init__.py */
enum {
    LANES = 16,      /* a sum is taken in so many parts, whatever the width of the processor's vectors */
    BLOCK = 64,      /* weights in one straight run of vector code */
    BATCH = 64,      /* groups whose scales are found before the first code: their divisions overlap */
    HELD = 4096,     /* codes that are collected before they are packed; they stay in the first-level cache */
    WORD_CODES = 32, /* so many codes of any width fill whole 32-bit words */
};
static const uint32_t ROUNDER = 0x4b400000; /* 1.5 * 2^23: a float32 added to it is rounded to whole, half to even */

const int32_t fleetpress_kernels_version = 2; /* of the functions' arguments; __init__.py compares it */

typedef struct {
    double signal[LANES], noise[LANES];
} Sums;

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE uint32_t load(const uint8_t *at, int64_t index, int dtype) {
    return dtype == F32 ? ((const u32 *)at)[index] : ((const u16 *)at)[index];
}

INLINE void store(uint8_t *at, int64_t index, int dtype, uint32_t bits) {
    if (dtype == F32)
        ((u32 *)at)[index] = bits;
    else
        ((u16 *)at)[index] = (uint16_t)bits;
}

/* The value of a weight's bits, exactly. */
INLINE float widen(uint32_t bits, int dtype) {
    if (dtype == F32) return as_float(bits);
    if (dtype == BF16) return as_float(bits << 16);
    uint32_t magnitude = (bits & 0x7fff) << 13;
    float normal = as_float(magnitude + (112u << 23));        /* exponents are biased by 15 there, by 127 here */
    float tiny = as_float(magnitude | 0x38800000) - 0x1p-14f; /* below 2^-14 a float16 has no leading one */
    return as_float(as_bits(magnitude < 1u << 23 ? tiny : normal) | (bits & 0x8000) << 16);
}

/* The bits of a value >= 0 that the dtype can hold: the opposite of `widen`. */
INLINE uint32_t narrow(float value, int dtype) {
    if (dtype == F32) return as_bits(value);
    if (dtype == BF16) return as_bits(value) >> 16;
    return value < 0x1p-14f ? (uint32_t)(value * 0x1p24f) : (as_bits(value) - (112u << 23)) >> 13;
}

/* `value` (far below the dtype's largest) rounded to what the dtype can hold, half to even. */
INLINE float rounded(float value, int dtype) {
    uint32_t bits = as_bits(value);
    if (dtype == F32) return value;
    if (dtype == BF16) return as_float((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
    float normal = as_float((bits + 0xfff + (bits >> 13 & 1)) & 0xffffe000);
    float tiny = (value + 0.75f) - 0.75f; /* from 0.5 to 1 the digits of float32 end at 2^-24, as those of float16 do */
    return (bits & 0x7fffffff) < 0x38800000 ? tiny : normal;
}

/* Smallest and largest weight of a group, stretched to hold zero, as bits; if symmetric, `high` is the largest
 * magnitude. Integers of the same order stand for the floats: they may be compared in any order, NaN beyond infinity. */
INLINE void find_range(const uint8_t *weights, int64_t count, int dtype, int symmetric, uint32_t *low, uint32_t *high) {
    const int32_t magnitude = dtype == F32 ? 0x7fffffff : 0x7fff;
    int32_t least = 0, most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t loaded = load(weights, i, dtype);
        int32_t bits = dtype == F32 ? (int32_t)loaded : (int16_t)loaded;
        bits = symmetric ? bits & magnitude : bits < 0 ? bits ^ magnitude : bits;
        most = bits > most ? bits : most;
        least = bits < least ? bits : least;
    }
    *high = (uint32_t)most;
    *low = (uint32_t)(least < 0 ? least ^ magnitude : 0) & (2u * (uint32_t)magnitude + 1);
}

/* Bits of a group's scale and, by `offset`, its zero point less the middle code: affine.quantization_parameters. */
INLINE uint32_t find_scale(float low, float high, int dtype, int bits, int symmetric, float *offset) {
    static const uint32_t EPSILON[] = {0x3c00, 0x1400, 0x34000000};
    const float steps = (float)((1 << bits) - 1), middle = (float)(1 << (bits - 1)), rounder = as_float(ROUNDER);
    float ideal = symmetric ? high / (steps / 2) : (high - low) / steps;
    if (dtype == F16 && ideal < 0x1p-16f) { /* float16 has few digits there: up to its next value */
        int32_t whole = (int32_t)(ideal * 0x1p24f);
        whole += (float)whole < ideal * 0x1p24f;
        ideal = (float)whole * 0x1p-24f;
    }
    uint32_t scale = narrow(rounded(ideal, dtype), dtype);
    *offset = 0;
    if (!symmetric) {
        float zero = -middle - low / widen(scale, dtype);
        zero = zero < -middle ? -middle : zero > middle - 1 ? middle - 1 : zero;
        *offset = scale == 0 ? 0 : (zero + rounder) - rounder;
    }
    return scale == 0 ? EPSILON[dtype] : scale;
}

/* Codes (plus `bias`, less the middle code) of up to BLOCK weights of one group, and what they add to the sums. */
INLINE void encode_block(const uint8_t *restrict weights, int count, int dtype, int symmetric, float scale,
                         float offset, int32_t middle, int32_t bias, uint8_t *restrict codes, Sums *restrict sums) {
    const int32_t lowest = (int32_t)ROUNDER - middle, highest = (int32_t)ROUNDER + middle - 1;
    const float zero = as_float(ROUNDER) + offset;
    float values[BLOCK], errors[BLOCK];
    int32_t wide[BLOCK];
    for (int i = 0; i < count; i++) {
        float value = widen(load(weights, i, dtype), dtype), ratio = value / scale;
        if (!symmetric) ratio += offset;
        /* In order of size floats are their bits as integers, so clamping can follow rounding, and needs no branch. */
        int32_t code = (int32_t)as_bits(ratio + as_float(ROUNDER));
        code = code < lowest ? lowest : code;
        code = code > highest ? highest : code;
        wide[i] = code + bias; /* the lowest byte of ROUNDER is 0 */
        if (count != BLOCK / 2) codes[i] = (uint8_t)wide[i];
        values[i] = value;
        errors[i] = rounded((as_float((uint32_t)code) - zero) * scale, dtype) - value;
    }
    if (count == BLOCK / 2) /* apart: as bytes so few fill half a register, and the loop above became as narrow */
        for (int i = 0; i < count; i++) codes[i] = (uint8_t)wide[i];
    const int padded = count > BLOCK / 2 ? BLOCK : BLOCK / 2;
    for (int i = count; i < padded; i++) values[i] = errors[i] = 0;
    for (int lane = 0; lane < LANES; lane++) {
        double signal = (double)values[lane] * values[lane], noise = (double)errors[lane] * errors[lane];
        for (int i = LANES; i < padded; i += LANES) {
            signal += (double)values[i + lane] * values[i + lane];
            noise += (double)errors[i + lane] * errors[i + lane];
        }
        sums->signal[lane] += signal;
        sums->noise[lane] += noise;
    }
}

/* The same for any number of weights of one group, in blocks of sizes that the compiler knows. */
INLINE void encode(const uint8_t *weights, int64_t count, int dtype, int symmetric, float scale, float offset,
                   int32_t middle, int32_t bias, uint8_t *codes, Sums *sums) {
    const int bytes = dtype == F32 ? 4 : 2;
    for (; count >= BLOCK; count -= BLOCK, weights += BLOCK * bytes, codes += BLOCK)
        encode_block(weights, BLOCK, dtype, symmetric, scale, offset, middle, bias, codes, sums);
    if (count >= BLOCK / 2) {
        encode_block(weights, BLOCK / 2, dtype, symmetric, scale, offset, middle, bias, codes, sums);
        count -= BLOCK / 2, weights += BLOCK / 2 * bytes, codes += BLOCK / 2;
    }
    if (count > 0) encode_block(weights, (int)count, dtype, symmetric, scale, offset, middle, bias, codes, sums);
}

/* The stream of `count` codes (a multiple of 32), lowest bit first; up to 8 bytes beyond its end are overwritten, and
 * the codes are used up. */
INLINE void pack(uint8_t *restrict codes, int64_t count, int bits, uint8_t *restrict stream) {
    if (bits == 8) {
        memcpy(stream, codes, (size_t)count);
    } else if (bits == 4) {
        for (int64_t i = 0; i < count / 2; i++) {
            uint32_t two = ((const u16 *)codes)[i];
            stream[i] = (uint8_t)(two | two >> 4);
        }
    } else if (bits == 2) {
        for (int64_t i = 0; i < count / 4; i++) {
            uint32_t four = ((const u32 *)codes)[i];
            stream[i] = (uint8_t)(four | four >> 6 | four >> 12 | four >> 18);
        }
    } else { /* eight codes of a register move together: first into pairs, then fours, then all */
        u64 *eights = (u64 *)codes;
        for (int64_t i = 0; i < count / 8; i++) {
            uint64_t eight = eights[i];
            eight = (eight & 0x00ff00ff00ff00ff) | (eight >> 8 & 0x00ff00ff00ff00ff) << bits;
            eight = (eight & 0x0000ffff0000ffff) | (eight >> 16 & 0x0000ffff0000ffff) << 2 * bits;
            eights[i] = (eight & 0x00000000ffffffff) | eight >> 32 << 4 * bits;
        }
        for (int64_t i = 0; i < count / 8; i++) *(u64 *)(stream + i * bits) = eights[i];
    }
}

/* Stores up to HELD codes of a row; gives where the next ones go. A row's last word is filled up with zeros. */
INLINE uint8_t *flush(uint8_t *codes, int64_t count, int bits, int layout, uint8_t *packed) {
    if (layout == CODE_BYTES) return (uint8_t *)memcpy(packed, codes, (size_t)count) + count;
    uint8_t stream[HELD + 8];
    const int64_t padded = (count + WORD_CODES - 1) / WORD_CODES * WORD_CODES, bytes = (count * bits + 31) / 32 * 4;
    memset(codes + count, 0, (size_t)(padded - count));
    pack(codes, padded, bits, stream);
    memcpy(packed, stream, (size_t)bytes);
    return packed + bytes;
}

/* Each group's zero points are a stream down the rows, of words that lie `groups` apart and start as zeros. */
INLINE void put_zero_points(const float *restrict offset, int64_t count, int64_t row, int bits, int64_t groups,
                            u32 *restrict words) {
    const int64_t word = row * bits / 32;
    const int shift = (int)(row * bits % 32);
    const float middle = (float)(1 << (bits - 1));
    for (int64_t i = 0; i < count; i++) words[word * groups + i] |= (uint32_t)(int32_t)(offset[i] + middle) << shift;
    if (shift + bits > 32)
        for (int64_t i = 0; i < count; i++)
            words[(word + 1) * groups + i] |= (uint32_t)(int32_t)(offset[i] + middle) >> (32 - shift);
}

/* Scales and offsets of a row's groups from `first` on; 1 if a weight is NaN or too large. */
INLINE int find_scales(const uint8_t *weights, int dtype, int64_t row, int64_t groups, int64_t first, int64_t count,
                       int64_t group, int bits, int symmetric, int layout, uint8_t *scales, uint8_t *zero_points,
                       float *scale, float *offset) {
    static const uint32_t LARGEST[] = {0x7e7f, 0x73ff, 0x7e7fffff}; /* a quarter of the dtype's largest value */
    const uint32_t magnitude = dtype == F32 ? 0x7fffffff : 0x7fff;
    uint32_t low[BATCH], high[BATCH];
    for (int64_t i = 0; i < count; i++) {
        find_range(weights + i * group * (dtype == F32 ? 4 : 2), group, dtype, symmetric, &low[i], &high[i]);
        if ((low[i] & magnitude) > LARGEST[dtype] || high[i] > LARGEST[dtype]) return 1;
    }
    for (int64_t i = 0; i < count; i++) {
        uint32_t found = find_scale(widen(low[i], dtype), widen(high[i], dtype), dtype, bits, symmetric, &offset[i]);
        scale[i] = widen(found, dtype);
        store(scales, row * groups + first + i, dtype, found);
    }
    if (symmetric) return 0;
    if (layout == CODE_BYTES)
        for (int64_t i = 0; i < count; i++) zero_points[row * groups + first + i] = (uint8_t)(int8_t)offset[i];
    else
        put_zero_points(offset, count, row, bits, groups, (u32 *)zero_points + first);
    return 0;
}

INLINE int quantize(const uint8_t *weights, int dtype, int64_t rows, int64_t columns, int64_t group, int bits,
                    int symmetric, int layout, uint8_t *packed, uint8_t *scales, uint8_t *zero_points, double *totals) {
    const int64_t groups = columns / group, bytes = dtype == F32 ? 4 : 2, fitting = HELD / group;
    const int64_t batch = fitting < 1 ? 1 : fitting > BATCH ? BATCH : fitting;
    const int32_t middle = 1 << (bits - 1), bias = layout == CODE_BYTES ? 0 : middle;
    uint8_t codes[2 * HELD];
    float scale[BATCH], offset[BATCH];
    Sums sums = {{0}, {0}};
    if (!symmetric && layout == PACKED)
        memset(zero_points, 0, (size_t)((rows * bits + 31) / 32 * groups * 4));
    for (int64_t row = 0; row < rows; row++) {
        int64_t held = 0;
        for (int64_t first = 0; first < groups; first += batch) {
            const int64_t count = groups - first < batch ? groups - first : batch;
            if (find_scales(weights, dtype, row, groups, first, count, group, bits, symmetric, layout, scales,
                            zero_points, scale, offset))
                return 1;
            for (int64_t i = 0; i < count; i++)
                for (int64_t left = group; left > 0;) { /* a group may be as long as a row, and that of any length */
                    const int64_t some = left < HELD ? left : HELD;
                    encode(weights, some, dtype, symmetric, scale[i], offset[i], middle, bias, codes + held, &sums);
                    weights += some * bytes, left -= some, held += some;
                    if (held < HELD) continue;
                    packed = flush(codes, HELD, bits, layout, packed);
                    held -= HELD;
                    memmove(codes, codes + HELD, (size_t)held);
                }
        }
        if (held) packed = flush(codes, held, bits, layout, packed);
    }
    totals[0] = totals[1] = 0;
    for (int lane = 0; lane < LANES; lane++) totals[0] += sums.signal[lane], totals[1] += sums.noise[lane];
    return 0;
}

/* Quantizes `weights` [rows, columns] with a scale for every `group` neighbours in a row (a divisor of `columns`).
 * Writes `packed` (rows of ceil(columns * bits / 32) words, or of `columns` bytes), `scales` [rows, groups] in the
 * weights' dtype, if not symmetric `zero_points` (ceil(rows * bits / 32) rows of `groups` words, or [rows, groups] bytes),
 * and `totals`: the sums of the squares of weights and of errors. Returns 1 for a weight that is NaN, infinite or beyond
 * a quarter of the dtype's range; what was written then is of no use. */
#define DEFINE(NAME, DTYPE)                                                                                           \
    VERSIONS int NAME(const uint8_t *weights, int64_t rows, int64_t columns, int64_t group, int bits, int symmetric,  \
                      int layout, uint8_t *packed, uint8_t *scales, uint8_t *zero_points, double *totals) {           \
        if (symmetric)                                                                                                \
            return quantize(weights, DTYPE, rows, columns, group, bits, 1, layout, packed, scales, NULL, totals);     \
        return quantize(weights, DTYPE, rows, columns, group, bits, 0, layout, packed, scales, zero_points, totals);  \
    }
DEFINE(fleetpress_quantize_bf16, BF16)
DEFINE(fleetpress_quantize_f16, F16)
DEFINE(fleetpress_quantize_f32, F32)
