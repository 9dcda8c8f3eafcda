/* Products of integers, for --dtype int8. Included by kernels.c.

   The inputs of a product are first rounded to integers, called codes, in one of two ways:

     narrow   weights of 4 bits: codes have 8 bits and a scale for each row and SUBGROUP features; the
              scales of a group are integer multiples of one float
     wide     weights of 8 bits: codes have 16 bits and a scale for each row and group, because AVX2 has
              no instruction that multiplies bytes of that range exactly

   So the sum over a group is an exact integer of 32 bits. Sums are added across groups in float32, in order.

   Weights are read as the float kernels pack them. To need no shuffles, the rounded inputs are stored in
   the order in which masks and shifts take the weights out of their words:

     narrow             per word of 8 features: 0 2 4 6 and 1 3 5 7, in 8 bits
     wide, PAIRWISE     per word of 4 features: 0 2 and 1 3, in 16 bits
     wide, BYTEWISE     per word of 4 features: the low bytes of 0 1 2 3, signed, and the high bytes

   BYTEWISE uses the dot products of newer CPUs (VNNI, AVX-VNNI, the dot product extension of ARM), PAIRWISE
   the instructions that all CPUs of a variant have. Both give the same bits. */

enum { PAIRWISE = 1, BYTEWISE = 2 }; /* values of `integers`; 0 means products in floating point */
enum {
    SUBGROUP = 16,       /* features */
    NARROW_LEVELS = 127, /* the largest code of 8 bits */
    WIDE_LEVELS = 127 * 256 + 127, /* of 16 bits; the high byte must not overflow when the low one is signed.
                                      GROUP * 255 * WIDE_LEVELS < 2^31 */
    MULTIPLES = 32767              /* 2 * SUBGROUP * 15 * NARROW_LEVELS * MULTIPLES < 2^31 */
};

/* The rounded inputs of one row and group: value = code * scale * multiple of the subgroup. */
typedef struct {
    float scale;
    union {
        float total;       /* Q4_1: the sum of the values, to be multiplied by the weights' offset */
        int32_t zero_sums; /* other formats: the weights' zero point * the sum of codes * multiples */
    };
    lane multiples[2]; /* of the subgroups of narrow inputs; for PAIRWISE, in both halves of the lane */
    lane codes[];
} Rounded;

/* For Q4_0, Q4_1 and Q8_0, the formats that are multiplied in integers. */
INLINE int is_wide(Format format) { return format == Q8_0; }

/* Bytes of a Rounded. */
INLINE int rounded_bytes(Format format) { return sizeof(Rounded) + (is_wide(format) ? 2 : 1) * GROUP; }

/* The dot products of ARM multiply signed integers only. */
INLINE int has_signed_weights(Format format, int integers) {
#if defined(__aarch64__)
    return is_wide(format) && integers == BYTEWISE;
#else
    (void)format, (void)integers;
    return 0;
#endif
}

/* ---- Rounding ---- */

typedef int8_t bytes_of_vec __attribute__((vector_size(WIDTH), may_alias, aligned(1)));
typedef int16_t shorts_of_vec __attribute__((vector_size(2 * WIDTH), may_alias, aligned(1)));

/* Permutes every eight lanes of a vector in the same way. */
#if WIDTH == 8
#define SHUFFLE_EIGHTS(value, a, b, c, d, e, f, g, h) \
    __builtin_shufflevector(value, value, a, b, c, d, e, f, g, h)
#else
#define SHUFFLE_EIGHTS(value, a, b, c, d, e, f, g, h) \
    __builtin_shufflevector(value, value, a, b, c, d, e, f, g, h, 8 + a, 8 + b, 8 + c, 8 + d, 8 + e, 8 + f, \
                            8 + g, 8 + h)
#endif

/* Converted in two steps, because GCC does it in one without vectors. */
INLINE bytes_of_vec narrow_to_bytes(ivec value) {
    return __builtin_convertvector(__builtin_convertvector(value, shorts_of_vec), bytes_of_vec);
}

/* Stores the codes of WIDTH inputs, in the order that the table at the top of this file lists. */
INLINE void store_input_codes(Format format, int integers, ivec codes, char *to) {
    if (!is_wide(format)) {
        ivec ordered = SHUFFLE_EIGHTS(codes, 0, 2, 4, 6, 1, 3, 5, 7);
        *(bytes_of_vec *)to = narrow_to_bytes(ordered);
    } else if (integers == PAIRWISE) {
        ivec ordered = SHUFFLE_EIGHTS(codes, 0, 2, 1, 3, 4, 6, 5, 7);
        *(shorts_of_vec *)to = __builtin_convertvector(ordered, shorts_of_vec);
    } else {
        ivec high = (codes + 128) >> 8;
        bytes_of_vec parts[2] = {narrow_to_bytes(codes - (high << 8)), narrow_to_bytes(high)};
        for (int word = 0; word < WIDTH / 4; word++)
            for (int part = 0; part < 2; part++)
                memcpy(to + 8 * word + 4 * part, (const char *)(parts + part) + 4 * word, 4);
    }
}

/* The larger of each two lanes. */
INLINE ivec max_of_ints(ivec a, ivec b) {
#if defined(__AVX512F__) && WIDTH == 16
    return (ivec)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && WIDTH == 8
    return (ivec)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return (ivec)select_lanes(a > b, (vec)a, (vec)b);
#endif
}

INLINE int32_t reduce_max_ints(ivec value) {
    value = max_of_ints(value, SHUFFLE_EIGHTS(value, 4, 5, 6, 7, 0, 1, 2, 3));
    value = max_of_ints(value, SHUFFLE_EIGHTS(value, 2, 3, 0, 1, 6, 7, 4, 5));
    value = max_of_ints(value, SHUFFLE_EIGHTS(value, 1, 0, 3, 2, 5, 4, 7, 6));
    return value[0] > value[WIDTH - 1] ? value[0] : value[WIDTH - 1];
}

INLINE int32_t reduce_sum_ints(ivec value) {
    value += SHUFFLE_EIGHTS(value, 4, 5, 6, 7, 0, 1, 2, 3);
    value += SHUFFLE_EIGHTS(value, 2, 3, 0, 1, 6, 7, 4, 5);
    value += SHUFFLE_EIGHTS(value, 1, 0, 3, 2, 5, 4, 7, 6);
    return WIDTH == 8 ? value[0] : value[0] + value[WIDTH - 1];
}

/* The largest magnitude in `count` vectors, as the bits of a float32; NaN if any value is NaN. */
INLINE int32_t max_magnitude_bits(int count, const vec values[]) {
    ivec top = {};
    for (int i = 0; i < count; i++)
        top = max_of_ints(top, (ivec)values[i] & 0x7fffffff); /* ordered like the magnitudes, NaN last */
    return reduce_max_ints(top);
}

INLINE float float_from_bits(int32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Rounds `count` vectors * `inverse` to codes, to nearest, ties to even. Stores them; returns their sum. */
INLINE int32_t round_values(Format format, int integers, int count, const vec values[], float inverse,
                            char *to) {
    ivec sums = {};
    for (int i = 0; i < count; i++) {
        vec shifted = fma_of(values[i], broadcast(inverse), broadcast(ROUND_SHIFT));
        ivec codes = (ivec)shifted - (ivec)broadcast(ROUND_SHIFT);
        sums += codes;
        store_input_codes(format, integers, codes, to + i * WIDTH * (is_wide(format) ? 2 : 1));
    }
    return reduce_sum_ints(sums);
}

/* Rounds GROUP inputs of a row.

   If their largest magnitude is not between 1e-30 and 1e38, where no scale and no inverse of one overflows
   or is subnormal, all codes are 0. The scale keeps infinity and NaN, so such products are NaN. */
INLINE void round_group(Format format, int integers, const elem *x, Rounded *out) {
    int parts = is_wide(format) ? 1 : 2, count = GROUP / WIDTH / parts;
    int multiples = is_wide(format) ? 1 : MULTIPLES, levels = is_wide(format) ? WIDE_LEVELS : NARROW_LEVELS;
    vec values[GROUP / WIDTH];
    for (int i = 0; i < GROUP / WIDTH; i++) values[i] = load(x + i * WIDTH);
    int32_t bits[2] = {max_magnitude_bits(count, values),
                       parts == 2 ? max_magnitude_bits(count, values + count) : 0};
    float largest = float_from_bits(bits[0] > bits[1] ? bits[0] : bits[1]);
    float scale = largest / ((float)levels * multiples);
    int is_normal = largest > 1e-30f && largest < 1e38f;
    int32_t sum = 0;
    for (int part = 0; part < parts; part++) {
        const vec *part_values = values + part * count;
        int multiple = 1;
        if (!is_wide(format))
            multiple = is_normal ? min_int(ceilf(float_from_bits(bits[part]) * (MULTIPLES / largest)),
                                           MULTIPLES)
                                 : 0;
        float inverse = is_normal && multiple ? 1.0f / (scale * multiple) : 0;
        char *to = (char *)(out->codes + part * SUBGROUP / 4);
        sum += multiple * round_values(format, integers, count, part_values, inverse, to);
        out->multiples[part] = integers == PAIRWISE ? multiple * 0x10001 : multiple;
    }
    out->scale = scale;
    if (format == Q4_1)
        out->total = scale * sum;
    else
        out->zero_sums = has_signed_weights(format, integers) ? 0 : sum * (1 << (weight_bits(format) - 1));
}

/* Rounds the inputs of one row; groups of the result are `stride` bytes apart. */
INLINE void round_groups(Format format, int integers, const elem *x, int features, char *out,
                         int64_t stride) {
    for (int at = 0; at < features; at += GROUP, out += stride)
        round_group(format, integers, x + at, (Rounded *)out);
}

static void round_row(Format format, int integers, const elem *x, int features, char *out, int64_t stride) {
    switch (format) {
        case Q4_0: round_groups(Q4_0, integers, x, features, out, stride); break;
        case Q4_1: round_groups(Q4_1, integers, x, features, out, stride); break;
        default: round_groups(Q8_0, integers, x, features, out, stride); break;
    }
}

/* ---- Multiplying ---- */

/* For each column of a vector, partial sums of products, which `total_of` adds. x86 uses only parts[0]. */
typedef struct {
    ivec parts[2];
} Partial;

/* sum += the products of the 4 bytes in each lane: unsigned weights (signed on ARM), signed codes. The
   instruction is in assembly language because the library is also loaded by CPUs without it. */
INLINE ivec add_bytewise(ivec sum, uvec weights, uvec codes) {
#if defined(EMULATE_VNNI)
    for (int i = 0; i < WIDTH; i++)
        for (int byte = 0; byte < 32; byte += 8)
            sum[i] += (int)(weights[i] >> byte & 255) * (int8_t)(codes[i] >> byte);
#elif defined(__aarch64__)
    union {
        uvec whole;
        int8x16_t quads[WIDTH / 4];
    } w = {weights}, c = {codes};
    union {
        ivec whole;
        int32x4_t quads[WIDTH / 4];
    } s = {sum};
    for (int i = 0; i < WIDTH / 4; i++)
        __asm__(".arch armv8.2-a+bf16+dotprod\n\tsdot %0.4s, %1.16b, %2.16b"
                : "+w"(s.quads[i])
                : "w"(w.quads[i]), "w"(c.quads[i]));
    sum = s.whole;
#elif WIDTH == 16 && defined(__AVX512F__)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(codes));
#elif WIDTH == 8
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(codes));
#else
    __builtin_trap();
#endif
    return sum;
}

#if defined(__aarch64__)
typedef union {
    uvec whole;
    int8x16_t bytes[WIDTH / 4];
    int16x8_t shorts[WIDTH / 4];
} Words;

typedef union {
    Partial whole;
    int16x8_t shorts[WIDTH / 4][2];
    int32x4_t ints[WIDTH / 4][2];
} Quads;

/* sum += the products of bytes. A sum of 16 bits gets 4 products of a subgroup: 4 * 15 * 127 < 2^15. */
INLINE void add_narrow(Partial *sum, uvec weights, uvec codes) {
    Words w = {weights}, c = {codes};
    Quads s = {*sum};
    for (int i = 0; i < WIDTH / 4; i++) {
        s.shorts[i][0] = vmlal_s8(s.shorts[i][0], vget_low_s8(w.bytes[i]), vget_low_s8(c.bytes[i]));
        s.shorts[i][1] = vmlal_high_s8(s.shorts[i][1], w.bytes[i], c.bytes[i]);
    }
    *sum = s.whole;
}

/* sum += the products of 16-bit integers. */
INLINE void add_wide(Partial *sum, uvec weights, uvec codes) {
    Words w = {weights}, c = {codes};
    Quads s = {*sum};
    for (int i = 0; i < WIDTH / 4; i++) {
        s.ints[i][0] = vmlal_s16(s.ints[i][0], vget_low_s16(w.shorts[i]), vget_low_s16(c.shorts[i]));
        s.ints[i][1] = vmlal_high_s16(s.ints[i][1], w.shorts[i], c.shorts[i]);
    }
    *sum = s.whole;
}

/* The sum of each column. */
INLINE ivec total_of(Format format, int integers, const Partial *sum) {
    if (integers == BYTEWISE) return sum->parts[0];
    Quads s = {*sum};
    union {
        ivec whole;
        int32x4_t quads[WIDTH / 4];
    } out;
    for (int i = 0; i < WIDTH / 4; i++)
        out.quads[i] = is_wide(format)
                           ? vpaddq_s32(s.ints[i][0], s.ints[i][1])
                           : vpaddq_s32(vpaddlq_s16(s.shorts[i][0]), vpaddlq_s16(s.shorts[i][1]));
    return out.whole;
}

/* The sum of a subgroup * its multiple. */
INLINE ivec times_multiple(Format format, int integers, const Partial *sum, lane multiple) {
    return total_of(format, integers, sum) * (int32_t)(multiple & 0xffff);
}
#else
typedef union {
    ivec whole;
    __m256i halves[WIDTH / 8];
} Halves;

/* sum += the products of the two 16-bit integers in each lane. */
INLINE ivec add_pair_products(ivec sum, ivec a, ivec b) {
#if defined(__AVX512F__) && WIDTH == 16
    return sum + (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
    Halves x = {a}, y = {b}, out;
    for (int i = 0; i < WIDTH / 8; i++) out.halves[i] = _mm256_madd_epi16(x.halves[i], y.halves[i]);
    return sum + out.whole;
#endif
}

/* sum += the products of bytes, added in pairs. A sum of 16 bits gets 8 products of a subgroup:
   8 * 15 * 127 < 2^15. */
INLINE void add_narrow(Partial *sum, uvec weights, uvec codes) {
#if defined(__AVX512F__) && WIDTH == 16
    __m512i products = _mm512_maddubs_epi16((__m512i)weights, (__m512i)codes);
    sum->parts[0] = (ivec)_mm512_add_epi16((__m512i)sum->parts[0], products);
#else
    Halves w = {(ivec)weights}, c = {(ivec)codes}, s = {sum->parts[0]};
    for (int i = 0; i < WIDTH / 8; i++)
        s.halves[i] =
            _mm256_add_epi16(s.halves[i], _mm256_maddubs_epi16(w.halves[i], c.halves[i]));
    sum->parts[0] = s.whole;
#endif
}

INLINE void add_wide(Partial *sum, uvec weights, uvec codes) {
    sum->parts[0] = add_pair_products(sum->parts[0], (ivec)weights, (ivec)codes);
}

/* The sum of each column; after `add_narrow`, still two sums of 16 bits. */
INLINE ivec total_of(Format format, int integers, const Partial *sum) {
    (void)format, (void)integers;
    return sum->parts[0];
}

/* The sum of a subgroup * its multiple. PAIRWISE sums are two of 16 bits in each lane; a BYTEWISE one has
   32 bits, but fits into 16, and the upper half of its multiple is 0. */
INLINE ivec times_multiple(Format format, int integers, const Partial *sum, lane multiple) {
    (void)format, (void)integers;
    return add_pair_products((ivec){}, sum->parts[0], (ivec){} + (int32_t)multiple);
}
#endif

/* ---- Products of a panel with rows ---- */

/* Rounded rows and the panel of weights that they are multiplied with. */
typedef struct {
    const char *weights;
    int features;
    const char *next; /* weights to prefetch, as many as the panel has, or NULL */
    const char *rounded; /* (groups, rows); groups are `stride` bytes apart */
    int64_t stride;
} IntegerTile;

/* Words of a column in a part of a group, whose weights are in registers at the same time. For narrow codes,
   8 weights in a word, a part is a SUBGROUP. */
enum { PART_WORDS = 2 };

/* The weights of a word that are multiplied together. Narrow: its low nibbles (half 0) or its high ones
   (half 1). Wide: its even or odd bytes for PAIRWISE, all bytes for BYTEWISE. */
INLINE uvec half_of_word(Format format, int integers, uvec word, int half) {
    if (!is_wide(format)) return (half ? word >> 4 : word) & 0x0f0f0f0f;
    if (integers == PAIRWISE) return (half ? word >> 8 : word) & 0x00ff00ff;
    if (has_signed_weights(format, integers)) return word ^ 0x80808080;
    return word;
}

/* The exact sum of the products of a part of a group for the columns of a vector. */
INLINE ivec part_sum(Format format, int integers, const uvec weights[], const uvec codes[], lane multiple) {
    Partial sum = {};
    if (is_wide(format) && integers == BYTEWISE) { /* high and low bytes */
        ivec high = {}, low = {};
        for (int word = 0; word < PART_WORDS; word++) {
            low = add_bytewise(low, weights[2 * word], codes[2 * word]);
            high = add_bytewise(high, weights[2 * word], codes[2 * word + 1]);
        }
        return high * 256 + low;
    }
    for (int i = 0; i < 2 * PART_WORDS; i++)
        if (integers == BYTEWISE)
            sum.parts[0] = add_bytewise(sum.parts[0], weights[i], codes[i]);
        else if (is_wide(format))
            add_wide(&sum, weights[i], codes[i]);
        else
            add_narrow(&sum, weights[i], codes[i]);
    return is_wide(format) ? total_of(format, integers, &sum)
                           : times_multiple(format, integers, &sum, multiple);
}

/* totals[r][v] += the sums of one part of a group; the last part adds the group to `sums` in float32.
   `part` is a constant in all calls: the first part sets the totals. */
INLINE void add_part(Format format, int integers, int part, int rows, const char *group, const char *rounded,
                     ivec totals[][2], vec sums[][2]) {
    int is_last = (part + 1) * PART_WORDS == weight_bits(format);
    const uvec *words = (const uvec *)(group + scale_bytes(format)) + part * PART_WORDS * 2;
    uvec weights[2][2 * PART_WORDS];
    vec scale[2], offset[2];
    for (int v = 0; v < 2; v++) {
        for (int i = 0; i < 2 * PART_WORDS; i++)
            weights[v][i] = half_of_word(format, integers, words[i / 2 * 2 + v], i % 2);
        scale[v] = load_float16(group + v * WIDTH * 2);
        offset[v] = format == Q4_1 ? load_float16(group + (PANEL + v * WIDTH) * 2) : (vec){};
    }
    for (int r = 0; r < rows; r++, rounded += rounded_bytes(format)) {
        const Rounded *row = (const Rounded *)rounded;
        uvec codes[2 * PART_WORDS];
        for (int i = 0; i < 2 * PART_WORDS; i++)
            codes[i] = (uvec){} + row->codes[part * 2 * PART_WORDS + i];
        lane multiple = is_wide(format) ? 1 : row->multiples[part];
        ivec total[2];
        for (int v = 0; v < 2; v++) {
            total[v] = part_sum(format, integers, weights[v], codes, multiple);
            if (part > 0) total[v] += totals[r][v];
        }
        if (!is_last) {
            totals[r][0] = total[0], totals[r][1] = total[1];
            continue;
        }
        vec row_scale = broadcast(row->scale), row_total = broadcast(row->total), sum[2];
        for (int v = 0; v < 2; v++) {
            if (format != Q4_1) total[v] -= row->zero_sums;
            vec value = __builtin_convertvector(total[v], vec);
            sum[v] = fma_of(value, scale[v] * row_scale, sums[r][v]);
            if (format == Q4_1) sum[v] = fma_of(offset[v], row_total, sum[v]);
        }
        sums[r][0] = sum[0], sums[r][1] = sum[1];
    }
}

INLINE void prefetch_group(Format format, const char *group) {
    for (int line = 0; line < group_bytes(format); line += LINE_BYTES) __builtin_prefetch(group + line, 0, 2);
}

/* sums += products of `rows` rounded rows with the two vectors of columns of a panel. */
INLINE void add_groups(Format format, int integers, int rows, const IntegerTile *tile, vec sums[][2]) {
    ivec totals[BLOCK_ROWS][2];
    const char *group = tile->weights, *rounded = tile->rounded;
    int num_groups = tile->features / GROUP;
    for (int g = 0; g < num_groups; g++, group += group_bytes(format), rounded += tile->stride) {
        if (tile->next) prefetch_group(format, tile->next + (int64_t)g * group_bytes(format));
        add_part(format, integers, 0, rows, group, rounded, totals, sums);
        add_part(format, integers, 1, rows, group, rounded, totals, sums);
        if (weight_bits(format) == 4) continue;
        add_part(format, integers, 2, rows, group, rounded, totals, sums);
        add_part(format, integers, 3, rows, group, rounded, totals, sums);
    }
}

/* A copy of `add_groups` for one format and kind of instructions. */
#define ADD_INTEGERS(name, format, integers) \
    static void name(int rows, const IntegerTile *tile, vec sums[][2]) { \
        add_groups(format, integers, rows, tile, sums); \
    }
ADD_INTEGERS(add_pairwise_q4_0, Q4_0, PAIRWISE)
ADD_INTEGERS(add_pairwise_q4_1, Q4_1, PAIRWISE)
ADD_INTEGERS(add_pairwise_q8_0, Q8_0, PAIRWISE)
ADD_INTEGERS(add_bytewise_q4_0, Q4_0, BYTEWISE)
ADD_INTEGERS(add_bytewise_q4_1, Q4_1, BYTEWISE)
ADD_INTEGERS(add_bytewise_q8_0, Q8_0, BYTEWISE)

/* sums += the products of a tile. */
static void add_integers(Format format, int integers, int rows, const IntegerTile *tile, vec sums[][2]) {
    int is_bytewise = integers == BYTEWISE;
    switch (format) {
        case Q4_0: (is_bytewise ? add_bytewise_q4_0 : add_pairwise_q4_0)(rows, tile, sums); break;
        case Q4_1: (is_bytewise ? add_bytewise_q4_1 : add_pairwise_q4_1)(rows, tile, sums); break;
        default: (is_bytewise ? add_bytewise_q8_0 : add_pairwise_q8_0)(rows, tile, sums); break;
    }
}
