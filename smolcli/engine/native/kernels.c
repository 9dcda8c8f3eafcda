/* The forward pass of a Llama over the tokens of many sequences, and greedy selection of tokens.

   Compiled ahead of time, once per CPU variant and weight format (tools/build_kernels.py):

     BF16_WEIGHTS   weights that are not quantized are stored in bfloat16, otherwise in float32;
                    quantized weights are rounded to bfloat16 as they are expanded
     BF16_PRODUCTS  activations and the KV cache are bfloat16 too, multiplied by the CPU's
                    bfloat16 instructions; otherwise they and the arithmetic are float32, except
                    that attention is computed in integers if products are (int8_attention.h)

   All matrices are packed into panels of PANEL output columns, so that a step reads each weight once,
   in order. Softmax, norms and the residual stream are float32 in every format, except that attention in
   integers rounds the weights of the softmax.

   Quantized matrices keep the integers and scales of their GGUF file. Their weights are expanded in
   registers if the step has few rows, otherwise once per panel into a buffer that stays in the cache.

   Outputs are batch-invariant: every sum adds its terms in the same order, however many rows are
   computed together and whichever thread computes them. Fused multiply-adds are explicit (`fma_of`), and
   the compiler must not fuse any others (-ffp-contract=off), so all tile heights round identically.

   Dimensions in comments: R rows (tokens) of the step, N output rows, whose hidden states the caller needs,
   H hidden size, I intermediate size, D head dimension. "Elements" are the values of activations and, unless
   attention is in integers, of the KV cache: bfloat16 or float32; a "lane" is 4 bytes of them.

   In this order: vectors; quantized weights; products, in floating point and in integers
   (int8_products.h); RMSNorm; attention, in both too (int8_attention.h); the operations of a step; the
   forward pass; the LM head (head.h). Threads are in team.c. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "team.h"

#if BF16_PRODUCTS && !BF16_WEIGHTS
#error "bfloat16 products need bfloat16 weights"
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "no kernels for this architecture"
#endif
#if BF16_PRODUCTS && !defined(EMULATE_BF16) && !defined(__AVX512BF16__) && \
    !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#error "this variant has no instructions for bfloat16"
#endif

#if BF16_PRODUCTS
typedef uint16_t elem;
#else
typedef float elem;
#endif

#ifndef WIDTH /* tests compile the 16-wide code for CPUs with 8-wide vectors */
#ifdef __AVX512F__
#define WIDTH 16
#else
#define WIDTH 8 /* on aarch64 a pair of NEON registers */
#endif
#endif

enum {
    TILE_ROWS = WIDTH == 16 ? 12 : 6, /* rows of a product whose sums, 2 vectors each, fit into registers */
    BLOCK_ROWS = 32,                  /* rows of a product of integers whose sums fit into the L1 cache */
    PANEL = 2 * WIDTH,                /* output columns of a panel */
    ELEMS = 4 / sizeof(elem),         /* elements per lane */
    WEIGHTS = BF16_WEIGHTS ? 2 : 1,   /* weights, not quantized, per lane */
    FEW_ROWS = TILE_ROWS / 2,         /* rows whose sums, 4 vectors each, fit into registers */
    KEY_BLOCK = 64,                   /* keys between two updates of the online softmax */
    TASK_ROWS = 48,                   /* query rows that share the transposed keys */
    MAX_HEAD_DIM = 256,
    GROUP = 32,            /* input features that share a scale: of weights (Q6_K: 16), of rounded inputs */
    ALIGNMENT = 64,        /* bytes, of packed weights */
    LINE_BYTES = 64,       /* of the cache */
    PREFETCH_RATE_BITS = 8 /* after the binary point; see `multiply_tile` */
};

typedef uint32_t lane __attribute__((may_alias)); /* one element of 4 bytes or two of 2 bytes */

/* Vectors of WIDTH lanes. A scalar operand is broadcast, so (ivec){} + n has n in all lanes. Comparisons give
   ivecs with -1 in the lanes where they hold. */
typedef float vec __attribute__((vector_size(4 * WIDTH), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH), may_alias));
typedef vec unaligned_vec __attribute__((aligned(4))); /* at any element of a float array */

#define LOG2_E 1.44269504f
#define ROUND_SHIFT 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer */
#define INLINE static inline __attribute__((always_inline))

/* How the weights of a matrix are stored: as they are multiplied, or as integers q of 4 or 8 bits.
   A group of input features of an output column shares a scale d and, in some formats, an offset m:

           q       group  d, m
     Q4_0  4 bits  32     float16  d * (q - 8)
     Q4_1  4 bits  32     float16  d * q + m
     Q8_0  8 bits  32     float16  d * (q - 128)  (GGUF has signed integers; packing adds 128)
     Q4_K  4 bits  32     float32  d * q + m
     Q5_K  8 bits  32     float32  d * q + m      (GGUF has 5 bits)
     Q6_K  8 bits  16     float32  d * (q - 128)  (GGUF has 6 bits; packing adds 96)

   GGUF's d and m are float16 or, in the last three, products of a float16 and an integer of 6 or 8
   bits. So d * q is exact in float32 where an offset follows, and d * (q - 128) is in Q6_K. */
typedef enum { DENSE, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K, NUM_FORMATS } Format;

/* A packed matrix. The panels of a quantized one consist of groups: the scales of all columns, their
   offsets if there are any, and the integers. These are words of 32 bits, (words, PANEL): a word has
   consecutive features of one column, the first in its lowest bits. */
typedef struct {
    const void *panels;
    int32_t format, padding;
} Matrix;

/* The weights of one layer; norms are (H,) float32. */
typedef struct {
    Matrix qkv, out, gate_up, down;
    const float *input_norm, *mlp_norm;
    const float *kv_limits; /* (2, kv_heads, D), largest magnitudes of keys and values; or NULL */
} Layer;

/* The shape and the weights of a model. */
typedef struct {
    int32_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim, vocab;
    int32_t integers; /* 0: quantized matrices are multiplied in floating point; or PAIRWISE or BYTEWISE */
    float eps, padding_2;
    const Layer *layers;
    Matrix embed, head; /* the same if they are tied */
    const float *norm;
    const float *cos, *sin; /* (positions, D / 2) */
    const float *head_lengths; /* (2, panels), the largest L2 norms of a column of the LM head, and of a
                                  column of |q * d| + |m|; or NULL */
} Model;

/* Consecutive rows of the step: tokens of one sequence, starting at position `start`. The last `num_hidden`
   of them are output rows.
   cache is (2, layers, kv_heads, length, D), keys first, elements or integers of 16 bits (int8_attention.h);
   length is a multiple of PANEL. */
typedef struct {
    int32_t first_row, num_rows, num_hidden, start, length, padding;
    char *cache;
} Span;

/* The R rows of a step, and its N output rows: beyond keys and values, the last layer computes only those. */
typedef struct {
    const int32_t *token_ids; /* (R,) */
    const Span *spans;        /* in the order of their rows */
    float *hidden;            /* (N, H), the result */
    int32_t *plan;            /* (10, R), scratch; see `plan_step` */
    int32_t num_spans, num_rows, num_hidden, padding;
} Batch;

/* Buffers for the activations of R rows. */
typedef struct {
    float *x;         /* (R, H), the residual stream */
    elem *normed;     /* (R, H), x * norm weight, not yet divided by the RMS */
    float *squares;   /* (H / PANEL, squares_stride), sums of squares of PANEL columns of x */
    elem *queries;    /* (R, num_heads, D) */
    elem *attended;   /* (R, num_heads, D) */
    elem *act;        /* (R, I) */
    int64_t squares_stride; /* at least R + WIDTH */
    char *expanded;         /* (threads, expanded_stride), an Expanded per thread; zero before first use */
    int64_t expanded_stride; /* bytes, a multiple of ALIGNMENT */
    char *rounded;           /* (groups, R), the inputs of a product of integers; see int8_products.h */
} Space;

/* The panel of a quantized matrix that a thread has expanded last. */
typedef struct {
    _Alignas(ALIGNMENT) const void *source;
    _Alignas(ALIGNMENT) lane panel[]; /* (depth, PANEL) */
} Expanded;

/* For each vector lane: the best logit so far, its token id, and whether any logit was NaN. */
typedef struct {
    vec value;
    ivec id, is_nan;
} Best;

EXPORT const char smol_source[] = "smol-source-" SOURCE_HASH;
EXPORT const int32_t smol_width = WIDTH;
EXPORT const int32_t smol_task_rows = TASK_ROWS;
EXPORT const int32_t smol_max_head_dim = MAX_HEAD_DIM;
EXPORT const int32_t smol_formats[2] = {BF16_WEIGHTS, BF16_PRODUCTS};
/* Compared with the structures of bindings.py when the library is loaded. */
EXPORT const int32_t smol_struct_sizes[7] = {sizeof(Layer), sizeof(Model),    sizeof(Span), sizeof(Batch),
                                             sizeof(Space), sizeof(Expanded), sizeof(Best)};

/* Return values of the exported functions; the first three are those of TeamStatus. */
enum { OK = TEAM_OK, FORKED = TEAM_FORKED, BUSY = TEAM_BUSY, MISALIGNED = 3, NOT_FINITE = 4 };

/* ---- Vectors ----

   `max_of`, `fma_of` and the like work lane by lane; `reduce_` functions combine the lanes of one vector. */

INLINE int min_int(int a, int b) { return a < b ? a : b; }

/* Reads memory into the second-level cache. The address may be invalid. */
INLINE void prefetch(const void *from, int num_bytes) {
    for (int i = 0; i < num_bytes; i += LINE_BYTES) __builtin_prefetch((const char *)from + i, 0, 2);
}

#define EIGHT_TIMES(value) value, value, value, value, value, value, value, value
#if WIDTH == 8
INLINE vec broadcast(float value) { return (vec){EIGHT_TIMES(value)}; }
#else
INLINE vec broadcast(float value) { return (vec){EIGHT_TIMES(value), EIGHT_TIMES(value)}; }
#endif

/* first, first + 1, ... */
INLINE ivec counting_from(int first) {
    ivec out;
    for (int i = 0; i < WIDTH; i++) out[i] = first + i;
    return out;
}

/* The elements of one lane in all lanes. */
INLINE vec broadcast_lane(lane value) { return (vec)((uvec){} + value); }

INLINE vec select_lanes(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

/* The larger of each two lanes, or b if one of them is NaN. */
INLINE vec max_of(vec a, vec b) {
#if defined(__AVX512F__) && WIDTH == 16
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && WIDTH == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select_lanes(a > b, a, b);
#endif
}

/* The smaller of each two lanes, or b if one of them is NaN. */
INLINE vec min_of(vec a, vec b) {
#if defined(__AVX512F__) && WIDTH == 16
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && WIDTH == 8
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select_lanes(a < b, a, b);
#endif
}

/* a * b + c, rounded once. */
INLINE vec fma_of(vec a, vec b, vec c) {
#if defined(__AVX512F__) && WIDTH == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && WIDTH == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    union {
        vec whole;
#if defined(__aarch64__)
        float32x4_t parts[WIDTH / 4];
#else
        __m256 parts[WIDTH / 8];
#endif
    } x = {a}, y = {b}, sum = {c};
    for (unsigned i = 0; i < sizeof(vec) / sizeof sum.parts[0]; i++)
#if defined(__aarch64__)
        sum.parts[i] = vfmaq_f32(sum.parts[i], x.parts[i], y.parts[i]);
#else
        sum.parts[i] = _mm256_fmadd_ps(x.parts[i], y.parts[i], sum.parts[i]);
#endif
    return sum.whole;
#endif
}

#if BF16_WEIGHTS
/* The bfloat16 values in the lower or upper halves of lanes, as float32. */
INLINE vec low_half(uvec lanes) { return (vec)(lanes << 16); }
INLINE vec high_half(uvec lanes) { return (vec)(lanes & 0xffff0000u); }
#endif

/* acc + a * b, summed over the elements of each lane. */
INLINE vec dot(vec acc, vec a, vec b) {
#if !BF16_PRODUCTS
    return fma_of(a, b, acc);
#elif defined(EMULATE_BF16)
    acc = fma_of(high_half((uvec)a), high_half((uvec)b), acc);
    return fma_of(low_half((uvec)a), low_half((uvec)b), acc);
#elif defined(__aarch64__)
    union {
        vec whole;
        float32x4_t sums[WIDTH / 4];
        bfloat16x8_t pairs[WIDTH / 4];
    } x = {a}, y = {b}, sum = {acc};
    for (int i = 0; i < WIDTH / 4; i++)
        sum.sums[i] = vbfdotq_f32(sum.sums[i], x.pairs[i], y.pairs[i]);
    return sum.whole;
#else
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#endif
}

/* WIDTH elements, as float32. */
INLINE vec load(const elem *from) {
#if !BF16_PRODUCTS
    return *(const unaligned_vec *)from;
#elif defined(__AVX512BF16__) && !defined(EMULATE_BF16)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#else
    uvec lanes;
    for (int i = 0; i < WIDTH; i++) lanes[i] = (uint32_t)from[i] << 16;
    return (vec)lanes;
#endif
}

/* Stores WIDTH elements, rounded to nearest, ties to even; NaN stays NaN. */
INLINE void store(elem *to, vec value) {
#if !BF16_PRODUCTS
    *(unaligned_vec *)to = value;
#elif defined(__AVX512BF16__) && !defined(EMULATE_BF16)
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
    uvec bits = (uvec)value;
    uvec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uvec is_nan = (uvec)(value != value);
    rounded = (is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded);
    for (int i = 0; i < WIDTH; i++) to[i] = (uint16_t)rounded[i];
#endif
}

/* WIDTH float16 values, as float32. */
INLINE vec load_float16(const void *from) {
#if defined(__AVX512F__) && WIDTH == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(from));
#else
    union {
        vec whole;
#if defined(__aarch64__)
        float32x4_t parts[WIDTH / 4];
#else
        __m256 parts[WIDTH / 8];
#endif
    } out;
    for (unsigned i = 0; i < sizeof(vec) / sizeof out.parts[0]; i++)
#if defined(__aarch64__)
        out.parts[i] = vcvt_f32_f16(vld1_f16((const float16_t *)from + 4 * i));
#else
        out.parts[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from + i));
#endif
    return out.whole;
#endif
}

/* The larger of two numbers, or the NaN among them. */
INLINE float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }

/* The largest lane; any if one is NaN. */
INLINE float reduce_max(vec value) {
    float largest = value[0];
    for (int i = 1; i < WIDTH; i++) largest = value[i] > largest ? value[i] : largest;
    return largest;
}

/* Adds the lanes in order. */
INLINE float reduce_sum(vec value) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += value[i];
    return sum;
}

/* 2^x within 2 ulp (Cephes, S. Moshier) for x up to 127; 0 below -126, NaN for NaN. */
INLINE vec exp2_of(vec x) {
    const uint32_t to_exponent = 127 - 0x4b400000u; /* from the bits of an integer plus ROUND_SHIFT */
    ivec is_small = x < -126.0f;
    vec bounded = max_of(broadcast(-126.0f), x);
    vec shifted = bounded + ROUND_SHIFT, fraction = bounded - (shifted - ROUND_SHIFT);
    vec p = broadcast(1.535336188e-4f);
    p = fma_of(p, fraction, broadcast(1.339887440e-3f));
    p = fma_of(p, fraction, broadcast(9.618437357e-3f));
    p = fma_of(p, fraction, broadcast(5.550332471e-2f));
    p = fma_of(p, fraction, broadcast(2.402264791e-1f));
    p = fma_of(p, fraction, broadcast(6.931472028e-1f));
    p = fma_of(p, fraction, broadcast(1.0f));
    return (vec)(~is_small & (ivec)(p * (vec)(((uvec)shifted + to_exponent) << 23)));
}

/* ---- Quantized weights ---- */

/* Bits of an integer q. */
INLINE int weight_bits(Format format) { return format == Q8_0 || format == Q5_K || format == Q6_K ? 8 : 4; }

INLINE int has_offsets(Format format) { return format == Q4_1 || format == Q4_K || format == Q5_K; }

INLINE int has_float_scales(Format format) { return format >= Q4_K; }

/* Input features per group. */
INLINE int group_size(Format format) { return format == Q6_K ? GROUP / 2 : GROUP; }

/* Words of 32 bits per group and column. */
INLINE int group_words(Format format) { return weight_bits(format) * group_size(format) / 32; }

/* Bytes of a group's scales and offsets, for all columns of a panel. */
INLINE int scale_bytes(Format format) {
    return (has_float_scales(format) ? 4 : 2) * (has_offsets(format) ? 2 : 1) * PANEL;
}

INLINE int group_bytes(Format format) { return scale_bytes(format) + group_words(format) * 4 * PANEL; }

INLINE int64_t panel_bytes(Format format, int features) {
    if (format == DENSE) return (int64_t)features / WEIGHTS * PANEL * 4;
    return (int64_t)features / group_size(format) * group_bytes(format);
}

/* Evaluate `call` with FORMAT as a constant, so that the compiler specializes it. */
#define FORMAT_CASE(format, call) \
    case format: { \
        enum { FORMAT = format }; \
        call; \
        break; \
    }
#define FOR_QUANTIZED(format, call) \
    switch (format) { \
        FORMAT_CASE(Q4_0, call) FORMAT_CASE(Q4_1, call) FORMAT_CASE(Q8_0, call) \
        FORMAT_CASE(Q4_K, call) FORMAT_CASE(Q5_K, call) FORMAT_CASE(Q6_K, call) \
    }

/* For each of the two vectors of a panel: weight = q * scale + offset, in float32. The second integer of a
   pair is not shifted down: (q << weight_bits) * shifted_scale = q * scale. */
typedef struct {
    vec scale[2], shifted_scale[2], offset[2];
} Scales;

/* A vector of a group's scales (vector 0 or 1) or of the offsets that follow them (2 or 3). */
INLINE vec load_scale_or_offset(Format format, const char *group, int vector) {
    return has_float_scales(format) ? ((const vec *)group)[vector] : load_float16(group + vector * WIDTH * 2);
}

INLINE Scales load_scales(Format format, const char *group) {
    Scales scales;
    for (int v = 0; v < 2; v++) {
        vec scale = load_scale_or_offset(format, group, v);
        scales.scale[v] = scale;
        scales.shifted_scale[v] = scale * (1.0f / (1 << weight_bits(format)));
        if (has_offsets(format))
            scales.offset[v] = load_scale_or_offset(format, group, 2 + v);
        else
            scales.offset[v] = scale * -(float)(1 << (weight_bits(format) - 1));
    }
    return scales;
}

/* An expanded weight as it is multiplied: in bfloat16, rounded to nearest, ties to even. */
INLINE vec round_weight(vec value) {
    uvec bits = (uvec)value;
    return BF16_WEIGHTS ? (vec)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u) : value;
}

/* Two consecutive features of the columns of a vector, from the lowest bits of the words.

   The product is exact in float32, so the fused multiply-add gives the same weight as a multiplication
   and an addition, rounded once. Without offsets, the sum is exact too. */
INLINE void expand_pair(Format format, uvec words, const Scales *scales, int v, vec *first,
                        vec *second) {
    uvec mask = (uvec){} + ((1u << weight_bits(format)) - 1);
    vec low = __builtin_convertvector((ivec)(words & mask), vec);
    vec high = __builtin_convertvector((ivec)(words & (mask << weight_bits(format))), vec);
    *first = fma_of(low, scales->scale[v], scales->offset[v]);
    *second = fma_of(high, scales->shifted_scale[v], scales->offset[v]);
}

#if BF16_WEIGHTS
/* Lanes of two features each, rounded to bfloat16. The instructions flush subnormal numbers to 0, but no
   weight is subnormal: scales and offsets are multiples of 2^-24. */
INLINE vec join_pair(vec first, vec second) {
#if defined(__AVX512BF16__) && !defined(EMULATE_BF16)
    uvec low = (uvec)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    uvec high = (uvec)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    return (vec)(low | high << 16);
#else
    return (vec)((uvec)round_weight(first) >> 16 | (uvec)round_weight(second));
#endif
}
#endif

/* Expands a quantized panel to the layout of a dense one, (depth, PANEL) lanes. */
INLINE void expand_panel(Format format, const char *panel, int features, lane *to) {
    int bits = weight_bits(format);
    vec *out = (vec *)to;
    for (int at = 0; at < features; at += group_size(format), panel += group_bytes(format)) {
        Scales scales = load_scales(format, panel);
        const uvec *words = (const uvec *)(panel + scale_bytes(format));
        for (int word = 0; word < group_words(format); word++, words += 2) {
            uvec remaining[2] = {words[0], words[1]};
            for (int pair = 0; pair < 16 / bits; pair++, out += 4 / WEIGHTS) {
                for (int v = 0; v < 2; v++) {
                    vec first, second;
                    expand_pair(format, remaining[v], &scales, v, &first, &second);
                    remaining[v] >>= 2 * bits;
#if BF16_WEIGHTS
                    out[v] = join_pair(first, second);
#else
                    out[v] = first, out[2 + v] = second;
#endif
                }
            }
        }
    }
}

#include "int8_products.h"

/* ---- Products with packed weights ---- */

/* Products of `rows` rows of x with the two vectors of columns of one panel.

   panel is (depth, PANEL) lanes, WEIGHTS input features each. x is (rows, depth * WEIGHTS) elements.
   Prefetches part of the next panel, from `next` on: per iteration, prefetch_rate / 2^PREFETCH_RATE_BITS
   cache lines, so that the tiles of a panel together prefetch the whole next one at an even rate. */
INLINE void multiply_tile(int rows, const lane *panel, int depth, const elem *x, const char *next,
                          int prefetch_rate, vec acc[][2]) {
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (vec){};
    for (int k = 0; k < depth; k++) {
        const vec *columns = (const vec *)(panel + k * PANEL);
        __builtin_prefetch(next + ((k * prefetch_rate) >> PREFETCH_RATE_BITS) * LINE_BYTES, 0, 2);
#if BF16_WEIGHTS && !BF16_PRODUCTS
        for (int half = 0; half < 2; half++) { /* input features 2 * k and 2 * k + 1 */
            vec first = half ? high_half((uvec)columns[0]) : low_half((uvec)columns[0]);
            vec second = half ? high_half((uvec)columns[1]) : low_half((uvec)columns[1]);
            for (int r = 0; r < rows; r++) {
                vec value = broadcast(x[(r * depth + k) * 2 + half]);
                sum[r][0] = fma_of(first, value, sum[r][0]);
                sum[r][1] = fma_of(second, value, sum[r][1]);
            }
        }
#else
        for (int r = 0; r < rows; r++) {
            vec value = broadcast_lane(((const lane *)x)[r * depth + k]);
            sum[r][0] = dot(sum[r][0], columns[0], value);
            sum[r][1] = dot(sum[r][1], columns[1], value);
        }
#endif
    }
    for (int r = 0; r < rows; r++) acc[r][0] = sum[r][0], acc[r][1] = sum[r][1];
}

/* The same with a quantized panel, whose weights are expanded in registers. */
INLINE void multiply_quantized_tile(Format format, int rows, const char *panel, int features, const elem *x,
                                    const char *next, int prefetch_rate, vec acc[][2]) {
    int bits = weight_bits(format), step = 0;
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (vec){};
    for (int at = 0; at < features; at += group_size(format), panel += group_bytes(format)) {
        Scales scales = load_scales(format, panel);
        const uvec *words = (const uvec *)(panel + scale_bytes(format));
        for (int word = 0; word < group_words(format); word++, words += 2, step++) {
            uvec remaining[2] = {words[0], words[1]};
            __builtin_prefetch(next + ((step * prefetch_rate) >> PREFETCH_RATE_BITS) * LINE_BYTES, 0, 2);
            for (int pair = 0; pair < 16 / bits; pair++, x += 2) {
                vec first[2], second[2];
                for (int v = 0; v < 2; v++) {
                    expand_pair(format, remaining[v], &scales, v, &first[v], &second[v]);
                    remaining[v] >>= 2 * bits;
#if BF16_PRODUCTS
                    first[v] = join_pair(first[v], second[v]);
#else
                    first[v] = round_weight(first[v]), second[v] = round_weight(second[v]);
#endif
                }
                for (int r = 0; r < rows; r++) {
                    const elem *values = x + r * features;
#if BF16_PRODUCTS
                    vec value = broadcast_lane(*(const lane *)values);
                    sum[r][0] = dot(sum[r][0], first[0], value);
                    sum[r][1] = dot(sum[r][1], first[1], value);
#else
                    sum[r][0] = fma_of(first[0], broadcast(values[0]), sum[r][0]);
                    sum[r][1] = fma_of(first[1], broadcast(values[0]), sum[r][1]);
                    sum[r][0] = fma_of(second[0], broadcast(values[1]), sum[r][0]);
                    sum[r][1] = fma_of(second[1], broadcast(values[1]), sum[r][1]);
#endif
                }
            }
        }
    }
    for (int r = 0; r < rows; r++) acc[r][0] = sum[r][0], acc[r][1] = sum[r][1];
}

/* Evaluate `call` with ROWS, which is at most TILE_ROWS, as a constant, so that the compiler keeps all sums
   in registers. */
#define ROWS_CASE(n, call) \
    case n: { \
        enum { ROWS = n }; \
        call; \
        break; \
    }
#if WIDTH == 16
#define WIDE_ROWS_CASES(call) \
    ROWS_CASE(7, call) ROWS_CASE(8, call) ROWS_CASE(9, call) \
    ROWS_CASE(10, call) ROWS_CASE(11, call) ROWS_CASE(12, call)
#else
#define WIDE_ROWS_CASES(call)
#endif
#define FOR_ROWS(rows, call) \
    switch (rows) { \
        ROWS_CASE(1, call) ROWS_CASE(2, call) ROWS_CASE(3, call) \
        ROWS_CASE(4, call) ROWS_CASE(5, call) ROWS_CASE(6, call) \
        WIDE_ROWS_CASES(call) \
    }

static void dispatch_tile(int rows, const lane *panel, int depth, const elem *x, const char *next,
                          int prefetch_rate, vec acc[][2]) {
    FOR_ROWS(rows, multiply_tile(ROWS, panel, depth, x, next, prefetch_rate, acc))
}

static void dispatch_quantized_tile(Format format, int rows, const char *panel, int features, const elem *x,
                                    const char *next, int prefetch_rate, vec acc[][2]) {
    FOR_QUANTIZED(format, FOR_ROWS(rows, multiply_quantized_tile(FORMAT, ROWS, panel, features, x, next,
                                                                 prefetch_rate, acc)))
}

/* A product of input rows with a packed matrix. */
typedef struct {
    Matrix weight; /* num_panels panels */
    int num_panels, features;
    const elem *x; /* (rows, features) */
    int rows;
    const Space *space;
    int integers; /* 0: multiply x; otherwise space->rounded, by PAIRWISE or BYTEWISE instructions */
} Product;

/* One item of a product: a panel of columns and a few rows. */
typedef struct {
    int panel, first_row, end_row;
    vec acc[BLOCK_ROWS][2];
} Tile;

INLINE int tiles_per_panel(const Product *product) {
    int max_rows = product->integers ? BLOCK_ROWS : TILE_ROWS;
    return (product->rows + max_rows - 1) / max_rows;
}

INLINE int num_product_items(const Product *product) {
    return product->num_panels * tiles_per_panel(product);
}

/* The lanes of a quantized panel, expanded into the worker's buffer unless it still holds them. */
static const lane *expanded_panel(const Product *product, const char *panel, int worker) {
    const Space *space = product->space;
    Expanded *expanded = (Expanded *)(space->expanded + worker * space->expanded_stride);
    if (expanded->source == panel) return expanded->panel;
    FOR_QUANTIZED(product->weight.format, expand_panel(FORMAT, panel, product->features, expanded->panel))
    expanded->source = panel;
    return expanded->panel;
}

/* How a model multiplies a matrix: as model->integers says, but dense matrices in floating point. */
INLINE int integers_of(const Model *model, const Matrix *weight) {
    return weight->format == DENSE ? 0 : model->integers;
}

/* Rounds one row of the inputs of a product of integers: an item of the operation before the product. */
static void round_inputs(const Product *product, int row) {
    Format format = product->weight.format;
    int group_stride = rounded_bytes(format);
    round_row(format, product->integers, product->x + (int64_t)row * product->features, product->features,
              product->space->rounded + (int64_t)row * group_stride, (int64_t)product->rows * group_stride);
}

/* Computes one item of a product. The tiles of a panel are consecutive items, so each panel is read from
   memory once; of a product of integers, the first tile prefetches the next panel. */
static void compute_tile(const Product *product, int item, int worker, Tile *out) {
    Format format = product->weight.format;
    int tiles = tiles_per_panel(product), index = item % tiles, features = product->features;
    out->panel = item / tiles;
    out->first_row = (int64_t)index * product->rows / tiles;
    out->end_row = (int64_t)(index + 1) * product->rows / tiles;
    int rows = out->end_row - out->first_row;
    const elem *x = product->x + (int64_t)out->first_row * features;
    int64_t num_bytes = panel_bytes(format, features);
    const char *panel = (const char *)product->weight.panels + out->panel * num_bytes;
    if (product->integers) {
        int group_stride = rounded_bytes(format);
        IntegerTile tile = {panel, features, index == 0 ? panel + num_bytes : NULL,
                            product->space->rounded + (int64_t)out->first_row * group_stride,
                            (int64_t)product->rows * group_stride};
        for (int r = 0; r < rows; r++) out->acc[r][0] = out->acc[r][1] = (vec){};
        add_integers(format, product->integers, rows, &tile, out->acc);
        return;
    }
    int in_registers = format != DENSE && tiles == 1;
    int steps = in_registers ? features / (32 / weight_bits(format)) : features / WEIGHTS;
    int prefetch_rate = (num_bytes << PREFETCH_RATE_BITS) / LINE_BYTES / tiles / steps;
    int64_t prefetched = (int64_t)index * steps * prefetch_rate >> PREFETCH_RATE_BITS; /* by earlier tiles */
    const char *next = panel + num_bytes + prefetched * LINE_BYTES;
    if (in_registers) {
        dispatch_quantized_tile(format, rows, panel, features, x, next, prefetch_rate, out->acc);
        return;
    }
    const void *lanes = format == DENSE ? panel : (const void *)expanded_panel(product, panel, worker);
    dispatch_tile(rows, lanes, features / WEIGHTS, x, next, prefetch_rate, out->acc);
}

/* ---- RMSNorm ----

   norm(x) = x / rms(x) * weight. The operation that writes x also writes x * weight, and one sum of
   squares per PANEL columns. The product that follows the norm divides its result by the RMS, which
   saves a pass over x. */

/* Writes x * weight and the sum of squares for the PANEL columns of one row of x, `first` and `second`. */
INLINE void prepare_norm(const Space *space, int hidden, const float *weight, int row, int panel,
                         vec first, vec second) {
    const unaligned_vec *weights = (const unaligned_vec *)(weight + panel * PANEL);
    elem *normed = space->normed + (int64_t)row * hidden + panel * PANEL;
    store(normed, first * weights[0]);
    store(normed + WIDTH, second * weights[1]);
    space->squares[panel * space->squares_stride + row] =
        reduce_sum(fma_of(second, second, first * first));
}

/* 1 / rms of the rows of a tile. */
INLINE void inverse_rms(const Space *space, int hidden, float eps, const Tile *tile, float out[]) {
    int rows = tile->end_row - tile->first_row;
    for (int first = 0; first < rows; first += WIDTH) {
        const float *squares = space->squares + tile->first_row + first;
        vec sum = {};
        for (int panel = 0; panel < hidden / PANEL; panel++)
            sum += *(const unaligned_vec *)(squares + panel * space->squares_stride);
        vec mean = sum / broadcast((float)hidden) + eps, root;
        for (int r = 0; r < WIDTH; r++) root[r] = sqrtf(mean[r]); /* vectorized: -fno-math-errno */
        vec inverse = 1.0f / root; /* lanes beyond the last row are undefined */
        for (int r = 0; r < min_int(WIDTH, rows - first); r++) out[first + r] = inverse[r];
    }
}

/* ---- Attention ----

   softmax(q @ k.T) @ v in blocks of KEY_BLOCK keys with an online softmax (FlashAttention-2, Dao 2023,
   arXiv:2307.08691). Blocks begin at multiples of KEY_BLOCK from position 0 in every step, so a query's
   sums have the same order alone, in a batch, and however its prompt is split into chunks. Masked keys, which
   a query must not see, get the weight 0, which leaves its sums unchanged.

   Each block prefetches the one after it, in the same task or the next, because prefetching by the CPU
   stops at the end of each page: 4 KiB, or 16 keys of 64 float32 values. */

/* Whether attention is computed in integers: if products are, on CPUs without bfloat16 instructions. */
INLINE int has_integer_attention(const Model *model) { return !BF16_PRODUCTS && model->integers; }

/* Bytes of a number in the KV cache. */
INLINE int cached_bytes(int in_integers) { return in_integers ? 2 : sizeof(elem); }

/* The largest magnitudes of the channels of a KV head's keys or values, (D,). */
INLINE const float *kv_limits(const Model *model, int layer, int is_value, int kv_head) {
    return model->layers[layer].kv_limits + (is_value * model->num_kv_heads + kv_head) * model->head_dim;
}

/* Up to TASK_ROWS query rows of one sequence and one KV head, sorted by `visible`. */
typedef struct {
    const char *keys, *values; /* (length, D), elements or integers */
    const char *next_keys, *next_values; /* of the following task, to prefetch */
    const float *key_limits, *value_limits; /* (D,), for integers */
    int num_keys, num_rows, dim;
    const elem *queries[TASK_ROWS]; /* (D,) each */
    elem *out[TASK_ROWS];           /* (D,) each */
    int visible[TASK_ROWS];         /* number of keys that the row attends to */
} Task;

/* The state of the online softmax, and scratch for one block. Rows of the larger arrays follow each other
   without gaps: at distances of powers of two they would compete for the same sets of the cache. */
typedef struct {
    vec keys[KEY_BLOCK / WIDTH * MAX_HEAD_DIM]; /* (key groups, lanes): the same lane of WIDTH keys */
    vec sums[TASK_ROWS * MAX_HEAD_DIM / WIDTH]; /* (rows, D / WIDTH), of weighted values */
    vec weights[WIDTH][KEY_BLOCK / WIDTH];      /* (rows of a tile, keys); before the softmax, scores */
    float highest[TASK_ROWS + WIDTH];           /* score so far; padded for loads of a vector */
    float total[TASK_ROWS + WIDTH];             /* of the weights so far */
    /* For attention in integers: */
    lane queries[TASK_ROWS * MAX_HEAD_DIM / 2]; /* (rows, D / 2), pairs of codes of 16 bits */
    float scale[TASK_ROWS + WIDTH];             /* of a row's scores */
} AttentionState;

/* Transposes WIDTH rows of WIDTH lanes. */
INLINE void transpose_square(const vec rows[], vec out[]) {
#define SHUFFLE __builtin_shufflevector
#if WIDTH == 8
    vec quads[2][4]; /* columns c and c + 4 of rows 0 to 3 or 4 to 7 */
    for (int g = 0; g < 2; g++) {
        vec a = rows[4 * g], b = rows[4 * g + 1], c = rows[4 * g + 2], d = rows[4 * g + 3];
        vec ab = SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13), ab2 = SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
        vec cd = SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13), cd2 = SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
        quads[g][0] = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13);
        quads[g][1] = SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
        quads[g][2] = SHUFFLE(ab2, cd2, 0, 1, 8, 9, 4, 5, 12, 13);
        quads[g][3] = SHUFFLE(ab2, cd2, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int c = 0; c < 4; c++) {
        out[c] = SHUFFLE(quads[0][c], quads[1][c], 0, 1, 2, 3, 8, 9, 10, 11);
        out[c + 4] = SHUFFLE(quads[0][c], quads[1][c], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
    vec quads[4][4]; /* columns c, c + 4, c + 8, c + 12 of rows 4 * g to 4 * g + 3 */
    for (int g = 0; g < 4; g++) {
        vec a = rows[4 * g], b = rows[4 * g + 1], c = rows[4 * g + 2], d = rows[4 * g + 3];
#define LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define LOW_PAIRS 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_PAIRS 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
        vec ab = SHUFFLE(a, b, LOW), ab2 = SHUFFLE(a, b, HIGH);
        vec cd = SHUFFLE(c, d, LOW), cd2 = SHUFFLE(c, d, HIGH);
        quads[g][0] = SHUFFLE(ab, cd, LOW_PAIRS), quads[g][1] = SHUFFLE(ab, cd, HIGH_PAIRS);
        quads[g][2] = SHUFFLE(ab2, cd2, LOW_PAIRS), quads[g][3] = SHUFFLE(ab2, cd2, HIGH_PAIRS);
    }
#define LOW_HALVES 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_HALVES 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define EVEN_QUARTERS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define ODD_QUARTERS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
    for (int c = 0; c < 4; c++) {
        vec low = SHUFFLE(quads[0][c], quads[1][c], LOW_HALVES);
        vec low_2 = SHUFFLE(quads[2][c], quads[3][c], LOW_HALVES);
        vec high = SHUFFLE(quads[0][c], quads[1][c], HIGH_HALVES);
        vec high_2 = SHUFFLE(quads[2][c], quads[3][c], HIGH_HALVES);
        out[c] = SHUFFLE(low, low_2, EVEN_QUARTERS), out[c + 4] = SHUFFLE(low, low_2, ODD_QUARTERS);
        out[c + 8] = SHUFFLE(high, high_2, EVEN_QUARTERS);
        out[c + 12] = SHUFFLE(high, high_2, ODD_QUARTERS);
    }
#endif
}

/* Transposes the keys of a block, rounded up to whole panels of keys: the last ones may be uninitialized.
   A key is `depth` lanes. Prefetches as many keys of the block that is computed next. */
INLINE void transpose_keys(const char *keys, const char *next, int num_keys, int depth,
                           AttentionState *state) {
    int row_bytes = depth * sizeof(lane);
    for (int group = 0; group < (num_keys + PANEL - 1) / PANEL * 2; group++)
        for (int k = 0; k < depth; k += WIDTH) {
            int64_t from = (int64_t)group * WIDTH * row_bytes + k * sizeof(lane);
            vec rows[WIDTH];
            for (int i = 0; i < WIDTH; i++) rows[i] = *(const unaligned_vec *)(keys + from + i * row_bytes);
            transpose_square(rows, state->keys + group * depth + k);
            prefetch(next + from, WIDTH * sizeof(vec));
        }
}

/* Scores of `rows` queries, from row `first` of the task, for a block of keys. */
INLINE void compute_scores(int rows, const Task *task, int first, int num_keys, int depth,
                           AttentionState *state) {
    for (int group = 0; group < (num_keys + PANEL - 1) / PANEL * 2; group += 2) {
        const vec *keys = state->keys + group * depth;
        vec sum[TILE_ROWS][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (vec){};
        for (int k = 0; k < depth; k++)
            for (int r = 0; r < rows; r++) {
                vec query = broadcast_lane(((const lane *)task->queries[first + r])[k]);
                sum[r][0] = dot(sum[r][0], keys[k], query);
                sum[r][1] = dot(sum[r][1], keys[depth + k], query);
            }
        for (int r = 0; r < rows; r++) {
            state->weights[r][group] = sum[r][0];
            state->weights[r][group + 1] = sum[r][1];
        }
    }
}

/* Replaces the scores of `rows` rows, from row `first` of the task, by weights, 2^(score - highest so far),
   and computes the factors that rescale the rows' sums so far. Keys start at position `block`. */
INLINE void update_softmax(int rows, const Task *task, int first, int block, int num_keys,
                           AttentionState *state, float shrink[]) {
    int num_vecs = (num_keys + WIDTH - 1) / WIDTH;
    vec partial[WIDTH], lanes[WIDTH];
    ivec lane_ids = counting_from(0);
    for (int r = rows; r < WIDTH; r++) partial[r] = (vec){};
    for (int r = 0; r < rows; r++) {
        vec *scores = state->weights[r];
        int visible = task->visible[first + r] - block;
        for (int v = visible < 0 ? 0 : visible / WIDTH; v < num_vecs; v++)
            scores[v] = select_lanes(lane_ids + v * WIDTH < visible, scores[v], broadcast(-INFINITY));
        partial[r] = scores[0];
        for (int v = 1; v < num_vecs; v++)
            partial[r] = max_of(scores[v], partial[r]);
    }
    /* Transposed, a reduction over the lanes of each row is one over vectors, for all rows at once. */
    transpose_square(partial, lanes);
    vec old = *(const unaligned_vec *)(state->highest + first), highest = old;
    for (int i = 0; i < WIDTH; i++) highest = max_of(lanes[i], highest);
    vec factor = exp2_of(old - highest);
    for (int r = 0; r < rows; r++) {
        vec *weights = state->weights[r];
        partial[r] = weights[0] = exp2_of(weights[0] - highest[r]);
        for (int v = 1; v < num_vecs; v++) {
            weights[v] = exp2_of(weights[v] - highest[r]);
            partial[r] += weights[v];
        }
    }
    transpose_square(partial, lanes);
    vec sum = lanes[0];
    for (int i = 1; i < WIDTH; i++) sum += lanes[i];
    vec total = *(const unaligned_vec *)(state->total + first) * factor + sum;
    for (int r = 0; r < rows; r++) {
        state->highest[first + r] = highest[r], state->total[first + r] = total[r];
        shrink[r] = factor[r];
    }
}

/* sums = sums * shrink + weights @ values, for `rows` rows and `vecs` vectors of D from `at` on. Prefetches
   as many values of the next block. */
INLINE void weighted_sum(int rows, int vecs, const char *values, const char *next, int num_keys, int dim,
                         int at, const vec (*weights)[KEY_BLOCK / WIDTH], const float shrink[], vec *sums) {
    vec acc[TILE_ROWS][4];
    int vec_bytes = WIDTH * sizeof(elem);
    sums += at;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) acc[r][v] = sums[r * (dim / WIDTH) + v] * shrink[r];
    for (int s = 0; s < num_keys; s++) {
        vec value[4];
        int64_t from = ((int64_t)s * (dim / WIDTH) + at) * vec_bytes;
        for (int v = 0; v < vecs; v++) value[v] = load((const elem *)(values + from) + v * WIDTH);
        prefetch(next + from, vecs * vec_bytes);
        for (int r = 0; r < rows; r++) {
            vec weight = broadcast(((const float *)weights[r])[s]);
            for (int v = 0; v < vecs; v++) acc[r][v] = fma_of(value[v], weight, acc[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) sums[r * (dim / WIDTH) + v] = acc[r][v];
}

/* Adds the weighted values of a block to the sums of `rows` rows, from row `first` of the task. */
INLINE void add_values(int rows, const Task *task, int first, const char *values, const char *next,
                       int num_keys, const float shrink[], AttentionState *state) {
    const vec(*weights)[KEY_BLOCK / WIDTH] = (const vec(*)[KEY_BLOCK / WIDTH])state->weights;
    int at = 0, num_vecs = task->dim / WIDTH; /* an even number */
    vec *sums = state->sums + first * num_vecs;
    if (rows <= FEW_ROWS)
        for (; at + 4 <= num_vecs; at += 4)
            weighted_sum(rows, 4, values, next, num_keys, task->dim, at, weights, shrink, sums);
    for (; at < num_vecs; at += 2)
        weighted_sum(rows, 2, values, next, num_keys, task->dim, at, weights, shrink, sums);
}

#include "int8_attention.h"

/* Attention of a tile of rows to one block of keys and values. */
INLINE void attend_block(int in_integers, int rows, const Task *task, int first, int block, int num_keys,
                         const char *values, const char *next_values, AttentionState *state) {
    float shrink[TILE_ROWS], grow[TILE_ROWS];
    if (in_integers) {
        compute_scores_in_integers(rows, task, first, num_keys, state);
        update_softmax_in_integers(rows, task, first, block, num_keys, state, shrink, grow);
        add_values_in_integers(rows, task, first, values, next_values, num_keys, shrink, grow, state);
    } else {
        compute_scores(rows, task, first, num_keys, task->dim / ELEMS, state);
        update_softmax(rows, task, first, block, num_keys, state, shrink);
        add_values(rows, task, first, values, next_values, num_keys, shrink, state);
    }
}

INLINE void attend_task(int in_integers, const Task *task) {
    AttentionState state;
    int num_vecs = task->dim / WIDTH, row_bytes = task->dim * cached_bytes(in_integers);
    for (int r = 0; r < TASK_ROWS + WIDTH; r++) state.highest[r] = -INFINITY, state.total[r] = 0;
    for (int i = 0; i < task->num_rows * num_vecs; i++) state.sums[i] = (vec){};
    if (in_integers) round_queries(task, &state);
    for (int block = 0; block < task->num_keys; block += KEY_BLOCK) {
        int num_keys = min_int(KEY_BLOCK, task->num_keys - block);
        int is_last = block + num_keys == task->num_keys;
        int64_t at = (int64_t)block * row_bytes, next = at + KEY_BLOCK * row_bytes;
        const char *next_keys = is_last ? task->next_keys : task->keys + next;
        const char *next_values = is_last ? task->next_values : task->values + next;
        transpose_keys(task->keys + at, next_keys, num_keys, row_bytes / sizeof(lane), &state);
        for (int first = 0; first < task->num_rows; first += TILE_ROWS) {
            int rows = min_int(TILE_ROWS, task->num_rows - first);
            /* Rows are sorted, so the last one sees the most keys of the block. */
            int seen = min_int(num_keys, task->visible[first + rows - 1] - block);
            if (seen > 0)
                FOR_ROWS(rows, attend_block(in_integers, ROWS, task, first, block, seen, task->values + at,
                                            next_values, &state))
        }
        /* A partial block is the last one and has prefetched only as many keys of the next task. */
        int begun = num_keys * row_bytes, rest = KEY_BLOCK * row_bytes - begun;
        prefetch(next_keys + begun, rest);
        prefetch(next_values + begun, rest);
    }
    for (int r = 0; r < task->num_rows; r++)
        for (int v = 0; v < num_vecs; v++) {
            vec value = state.sums[r * num_vecs + v] * (1.0f / state.total[r]);
            if (in_integers) value *= value_scales(task, v);
            store(task->out[r] + v * WIDTH, value);
        }
}

static void attend_in_elements(const Task *task) { attend_task(0, task); }
static void attend_in_integers(const Task *task) { attend_task(1, task); }

/* ---- The operations of a step; see `step_items` for their order. ---- */

/* Consecutive tokens of a span whose attention is computed together, for each KV head: at most TASK_ROWS
   query rows, one per token and query head of the KV head. */
typedef struct {
    int32_t span, first_row, end_row; /* rows of the span */
    int32_t attended_row;             /* for the first row */
} TaskTokens;

typedef struct {
    TaskTokens *list;
    int num_tasks;
} Tasks;

/* A forward pass. */
typedef struct {
    const Model *model;
    const Batch *batch;
    const Space *space;
    int32_t *span_of_row; /* (R,) */
    int32_t *output_rows; /* (N,), their indices */
    Tasks tasks, last_tasks; /* of all rows; of the output rows, for the last layer */
    int *has_nonfinite;      /* set if a key or value is not finite, which a code cannot express */
} Step;

/* Adds the tasks for the rows of a span from its row `first` on. */
static void add_tasks(Tasks *tasks, const Step *step, int span, int first, int attended_row) {
    int size = TASK_ROWS / (step->model->num_heads / step->model->num_kv_heads);
    int num_rows = step->batch->spans[span].num_rows;
    for (int row = first; row < num_rows; row += size) {
        int end = min_int(row + size, num_rows);
        tasks->list[tasks->num_tasks++] = (TaskTokens){span, row, end, attended_row + row - first};
    }
}

/* Divides batch->plan into span_of_row, output_rows and the two lists of tasks, R * (1 + 1 + 4 + 4) numbers,
   and fills them. A row needs at most one task. */
static Step plan_step(const Model *model, const Batch *batch, const Space *space) {
    int64_t rows = batch->num_rows;
    Step step = {.model = model, .batch = batch, .space = space};
    step.span_of_row = batch->plan, step.output_rows = batch->plan + rows;
    step.tasks.list = (TaskTokens *)(batch->plan + 2 * rows);
    step.last_tasks.list = step.tasks.list + rows;
    for (int s = 0, hidden = 0; s < batch->num_spans; s++) {
        const Span *span = batch->spans + s;
        int first_hidden = span->num_rows - span->num_hidden;
        add_tasks(&step.tasks, &step, s, 0, span->first_row);
        add_tasks(&step.last_tasks, &step, s, first_hidden, hidden);
        for (int row = 0; row < span->num_rows; row++) {
            step.span_of_row[span->first_row + row] = s;
            if (row >= first_hidden) step.output_rows[hidden++] = span->first_row + row;
        }
    }
    return step;
}

INLINE int is_last_layer(const Step *step, int layer) { return layer + 1 == step->model->num_layers; }

INLINE Tasks tasks_of(const Step *step, int layer) {
    return is_last_layer(step, layer) ? step->last_tasks : step->tasks;
}

/* x = a column of a dense panel. */
INLINE void embed_dense(const void *panel, int column, int features, float *x) {
    const lane *from = (const lane *)panel + column;
    for (int k = 0; k < features / WEIGHTS; k++) {
        lane value = from[(int64_t)k * PANEL];
        for (int e = 0; e < WEIGHTS; e++) {
            uint32_t bits = WEIGHTS == 2 ? (value >> (16 * e)) << 16 : value;
            memcpy(x + k * WEIGHTS + e, &bits, 4);
        }
    }
}

/* x = a column of a quantized panel, whose first group is `group`. */
INLINE void embed_quantized(Format format, const char *group, int column, int features, float *x) {
    int bits = weight_bits(format), vector = column / WIDTH, in_vector = column % WIDTH;
    for (int feature = 0; feature < features; group += group_bytes(format)) {
        Scales scales = load_scales(format, group);
        const uvec *words = (const uvec *)(group + scale_bytes(format)) + vector;
        for (int word = 0; word < group_words(format); word++) {
            uvec remaining = words[2 * word];
            for (int pair = 0; pair < 16 / bits; pair++, feature += 2) {
                vec first, second;
                expand_pair(format, remaining, &scales, vector, &first, &second);
                remaining >>= 2 * bits;
                x[feature] = round_weight(first)[in_vector];
                x[feature + 1] = round_weight(second)[in_vector];
            }
        }
    }
}

/* x[row] = embedding of its token. One item per row. */
static void embed(const Step *step, int row) {
    const Model *model = step->model;
    Format format = model->embed.format;
    int id = step->batch->token_ids[row], hidden = model->hidden, column = id % PANEL;
    const char *token_panel = (const char *)model->embed.panels + id / PANEL * panel_bytes(format, hidden);
    float *x = step->space->x + (int64_t)row * hidden;
    if (format == DENSE) embed_dense(token_panel, column, hidden, x);
    FOR_QUANTIZED(format, embed_quantized(FORMAT, token_panel, column, hidden, x))
    for (int panel = 0; panel < hidden / PANEL; panel++) {
        const unaligned_vec *values = (const unaligned_vec *)(x + panel * PANEL);
        prepare_norm(step->space, hidden, model->layers[0].input_norm, row, panel, values[0], values[1]);
    }
}

/* Applies the rotary embedding to one row of a q, k and v tile; stores queries in the buffer, and keys
   and values in the KV cache.

   Weights are packed so that the two vectors of a panel are dimensions i.. and D / 2 + i.. of one head,
   which the rotation combines. */
INLINE void store_qkv(const Step *step, int layer, int row, int panel, vec first, vec second) {
    const Model *model = step->model;
    const Span *span = step->batch->spans + step->span_of_row[row];
    int dim = model->head_dim, half = dim / 2, heads = model->num_heads;
    int head = panel / (dim / PANEL), i = panel % (dim / PANEL) * WIDTH;
    int64_t position = span->start + row - span->first_row;
    if (head < heads + model->num_kv_heads) {
        vec cos = *(const unaligned_vec *)(model->cos + position * half + i);
        vec sin = *(const unaligned_vec *)(model->sin + position * half + i);
        vec rotated = first * cos - second * sin;
        second = second * cos + first * sin;
        first = rotated;
    }
    if (head < heads) {
        float scale = LOG2_E / sqrtf(dim); /* the softmax takes powers of 2 */
        elem *to = step->space->queries + ((int64_t)row * heads + head) * dim;
        store(to + i, first * scale);
        store(to + half + i, second * scale);
        return;
    }
    int is_value = head >= heads + model->num_kv_heads, kv_head = (head - heads) % model->num_kv_heads;
    int64_t plane = (int64_t)is_value * model->num_layers + layer;
    int64_t offset = (plane * model->num_kv_heads + kv_head) * span->length * dim;
    if (has_integer_attention(model)) {
        int16_t *codes = (int16_t *)span->cache + offset;
        const float *limits = kv_limits(model, layer, is_value, kv_head);
        int is_finite = store_kv_codes(is_value, codes, position, dim, i, limits, first) &
                        store_kv_codes(is_value, codes, position, dim, half + i, limits, second);
        if (!is_finite) __atomic_store_n(step->has_nonfinite, 1, __ATOMIC_RELAXED);
    } else {
        elem *to = (elem *)span->cache + offset + position * dim + i;
        store(to, first);
        store(to + half, second);
    }
}

/* q, k, v = norm(x) @ weight.T */
static void project_qkv(const Step *step, int layer, const Product *product, int item, int worker) {
    Tile tile;
    float scale[BLOCK_ROWS];
    compute_tile(product, item, worker, &tile);
    inverse_rms(step->space, step->model->hidden, step->model->eps, &tile, scale);
    for (int r = 0; r < tile.end_row - tile.first_row; r++)
        store_qkv(step, layer, tile.first_row + r, tile.panel, tile.acc[r][0] * scale[r],
                  tile.acc[r][1] * scale[r]);
}

/* to = from + product; also prepares the next norm. Row r of the product is added to row from_rows[r] of
   `from`, or to row r if from_rows is NULL. */
static void add_product(const Step *step, const Product *product, const float *from,
                        const int32_t *from_rows, float *to, const float *next_norm, int item, int worker) {
    Tile tile;
    int hidden = step->model->hidden;
    compute_tile(product, item, worker, &tile);
    for (int r = 0; r < tile.end_row - tile.first_row; r++) {
        int row = tile.first_row + r, column = tile.panel * PANEL;
        int64_t from_row = from_rows ? from_rows[row] : row;
        const unaligned_vec *x = (const unaligned_vec *)(from + from_row * hidden + column);
        unaligned_vec *sum = (unaligned_vec *)(to + (int64_t)row * hidden + column);
        vec first = x[0] + tile.acc[r][0], second = x[1] + tile.acc[r][1];
        sum[0] = first, sum[1] = second;
        prepare_norm(step->space, hidden, next_norm, row, tile.panel, first, second);
    }
}

/* act = silu(norm(x) @ gate.T) * (norm(x) @ up.T); a panel is WIDTH columns of each. */
static void activate(const Step *step, const Product *product, int item, int worker) {
    Tile tile;
    float scale[BLOCK_ROWS];
    const Model *model = step->model;
    compute_tile(product, item, worker, &tile);
    inverse_rms(step->space, model->hidden, model->eps, &tile, scale);
    for (int r = 0; r < tile.end_row - tile.first_row; r++) {
        vec gate = tile.acc[r][0] * scale[r], up = tile.acc[r][1] * scale[r], exponent = gate * -LOG2_E;
        exponent = min_of(broadcast(127.0f), exponent); /* for exp2_of; NaN stays NaN */
        int64_t row = tile.first_row + r;
        store(step->space->act + row * model->intermediate + tile.panel * WIDTH,
              gate / (exp2_of(exponent) + 1.0f) * up);
    }
}

/* The keys or values of a plane of the KV cache that the task of an item attends to. */
INLINE const char *plane_of(const Step *step, const TaskTokens *tokens, int64_t plane, int item) {
    const Model *model = step->model;
    const Span *span = step->batch->spans + tokens->span;
    int64_t head = plane * model->num_kv_heads + item % model->num_kv_heads;
    return span->cache + head * span->length * model->head_dim * cached_bytes(has_integer_attention(model));
}

/* Attention of the rows of a task over one KV head; `item` selects both. */
static void attend(const Step *step, int layer, int item) {
    const Model *model = step->model;
    Tasks tasks = tasks_of(step, layer);
    int dim = model->head_dim, heads = model->num_heads, kv_heads = model->num_kv_heads;
    int heads_per_kv = heads / kv_heads, head = item % kv_heads, value_plane = layer + model->num_layers;
    int next_item = min_int(item + 1, tasks.num_tasks * kv_heads - 1);
    const TaskTokens *tokens = tasks.list + item / kv_heads, *next = tasks.list + next_item / kv_heads;
    const Span *span = step->batch->spans + tokens->span;
    Task task = {.keys = plane_of(step, tokens, layer, item),
                 .values = plane_of(step, tokens, value_plane, item),
                 .next_keys = plane_of(step, next, layer, next_item),
                 .next_values = plane_of(step, next, value_plane, next_item),
                 .num_keys = span->start + tokens->end_row,
                 .dim = dim};
    if (has_integer_attention(model)) {
        task.key_limits = kv_limits(model, layer, 0, head);
        task.value_limits = kv_limits(model, layer, 1, head);
    }
    for (int row = tokens->first_row; row < tokens->end_row; row++)
        for (int h = head * heads_per_kv; h < (head + 1) * heads_per_kv; h++) {
            int64_t from = span->first_row + row, to = tokens->attended_row + row - tokens->first_row;
            task.queries[task.num_rows] = step->space->queries + (from * heads + h) * dim;
            task.out[task.num_rows] = step->space->attended + (to * heads + h) * dim;
            task.visible[task.num_rows++] = span->start + row + 1;
        }
    (has_integer_attention(model) ? attend_in_integers : attend_in_elements)(&task);
}

/* ---- The forward pass ---- */

/* The operations of a layer, in order. Each product follows the rounding of its inputs, which has no items
   unless the product is of integers. */
enum { ROUND_QKV, QKV, ATTEND, ROUND_OUT, OUT, ROUND_GATE_UP, GATE_UP, ROUND_DOWN, DOWN, OPS_PER_LAYER };

INLINE int is_rounding(int kind) {
    return kind == ROUND_QKV || kind == ROUND_OUT || kind == ROUND_GATE_UP || kind == ROUND_DOWN;
}

/* The product that an operation computes, or rounds the inputs of. */
static Product layer_product(const Step *step, int index, int kind) {
    const Model *model = step->model;
    const Layer *layer = model->layers + index;
    const Space *space = step->space;
    const Batch *batch = step->batch;
    int rows = is_last_layer(step, index) && kind > ATTEND ? batch->num_hidden : batch->num_rows;
    int hidden = model->hidden, inner = model->num_heads * model->head_dim;
    int qkv = inner + 2 * model->num_kv_heads * model->head_dim;
    Product product = {.features = hidden, .rows = rows, .x = space->normed, .space = space};
    switch (is_rounding(kind) ? kind + 1 : kind) {
        case QKV: product.weight = layer->qkv, product.num_panels = qkv / PANEL; break;
        case OUT:
            product.weight = layer->out, product.num_panels = hidden / PANEL;
            product.x = space->attended, product.features = inner;
            break;
        case GATE_UP:
            product.weight = layer->gate_up, product.num_panels = model->intermediate / WIDTH;
            break;
        default:
            product.weight = layer->down, product.num_panels = hidden / PANEL;
            product.x = space->act, product.features = model->intermediate;
    }
    product.integers = integers_of(model, &product.weight);
    return product;
}

/* Operation 0 is the embedding, followed by OPS_PER_LAYER operations per layer. */
static int step_items(const void *work, int op) {
    const Step *step = work;
    if (op == 0) return step->batch->num_rows;
    int layer = (op - 1) / OPS_PER_LAYER, kind = (op - 1) % OPS_PER_LAYER;
    if (layer >= step->model->num_layers) return -1;
    if (kind == ATTEND) return tasks_of(step, layer).num_tasks * step->model->num_kv_heads;
    Product product = layer_product(step, layer, kind);
    if (is_rounding(kind)) return product.integers ? product.rows : 0;
    return num_product_items(&product);
}

static void compute_step(const void *work, int op, int item, int worker) {
    const Step *step = work;
    const Model *model = step->model;
    if (op == 0) {
        embed(step, item);
        return;
    }
    int index = (op - 1) / OPS_PER_LAYER, kind = (op - 1) % OPS_PER_LAYER;
    const Layer *layer = model->layers + index;
    int is_last = is_last_layer(step, index);
    const float *next_norm = is_last ? model->norm : layer[1].input_norm;
    float *x = step->space->x, *to = is_last ? step->batch->hidden : x;
    const int32_t *from_rows = is_last ? step->output_rows : NULL;
    Product product = layer_product(step, index, kind);
    if (is_rounding(kind)) {
        round_inputs(&product, item);
        return;
    }
    switch (kind) {
        case QKV: project_qkv(step, index, &product, item, worker); break;
        case ATTEND: attend(step, index, item); break;
        case OUT: add_product(step, &product, x, from_rows, to, layer->mlp_norm, item, worker); break;
        case GATE_UP: activate(step, &product, item, worker); break;
        default: add_product(step, &product, to, NULL, to, next_norm, item, worker); break;
    }
}

static int is_aligned(const void *weights) { return (uintptr_t)weights % ALIGNMENT == 0; }

static int has_aligned_weights(const Model *model) {
    int aligned = is_aligned(model->embed.panels) && is_aligned(model->head.panels);
    for (int i = 0; i < model->num_layers; i++) {
        const Layer *layer = model->layers + i;
        aligned = aligned && is_aligned(layer->qkv.panels) && is_aligned(layer->out.panels) &&
                  is_aligned(layer->gate_up.panels) && is_aligned(layer->down.panels);
    }
    return aligned;
}

/* Computes batch->hidden, the hidden states of the output rows after the last layer. */
EXPORT int smol_forward(Team *team, const Model *model, const Batch *batch, const Space *space) {
    if (!has_aligned_weights(model)) return MISALIGNED;
    static const Program program = {step_items, compute_step};
    Step step = plan_step(model, batch, space);
    int has_nonfinite = 0;
    step.has_nonfinite = &has_nonfinite;
    int status = team_run(team, &program, &step);
    return status == OK && has_nonfinite ? NOT_FINITE : status;
}

#include "head.h"
