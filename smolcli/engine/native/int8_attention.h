/* Attention in integers, for --dtype int8 where elements are float32. Included by kernels.c.

   CPUs without bfloat16 instructions multiply integers of 16 bits twice as fast as float32 values. The KV
   cache contains such integers, called codes. RMSNorm bounds the inputs of the projections, so the largest
   magnitude that each channel of a key or value can have, its limit, is known when the model is loaded, and
   no scales need to be stored with the codes:

     keys      (length, D), code = key * KEY_LEVELS / limit
     values    (length / 2, D, 2), code = value * VALUE_LEVELS / limit; two positions side by side

   Queries have a scale per row, softmax weights one per row and block. So scores, and the weighted sums of
   a block, are exact integers of 32 bits; blocks are added in float32, in order. */

enum {
    KEY_LEVELS = 32767,
    QUERY_SUM = 32767,    /* of the magnitudes of a row's codes: scores are less than 2^30 */
    VALUE_LEVELS = 16383, /* KEY_BLOCK * MAX_WEIGHT * VALUE_LEVELS < 2^31 */
    MAX_WEIGHT = 2048,
    LOWEST_EXPONENT = -40, /* lower ones are raised to it: MAX_WEIGHT * 2^-40 rounds to 0 */
    INFINITY_BITS = 0x7f800000,
    MASKED_SCORE = -(1 << 30), /* less than any score, and differences still fit into 32 bits */
#if defined(__aarch64__)
    TILE_VECS = 1 /* vectors of sums per row that fit into registers: a Partial has two parts in use */
#else
    TILE_VECS = 2
#endif
};

/* ---- The KV cache ---- */

/* Rounds to the nearest integers, ties to even. Magnitudes are at most 2^22. */
INLINE ivec round_to_ints(vec value) {
#if defined(__AVX512F__) && WIDTH == 16
    return (ivec)_mm512_cvtps_epi32((__m512)value);
#elif defined(__AVX2__) && WIDTH == 8
    return (ivec)_mm256_cvtps_epi32((__m256)value);
#else
    return (ivec)(value + ROUND_SHIFT) - (ivec)broadcast(ROUND_SHIFT);
#endif
}

/* Stores two vectors of integers, which fit into 16 bits, in order. */
INLINE void store_shorts(void *to, ivec first, ivec second) {
#if defined(__AVX2__) && WIDTH == 8
    __m256i packed = _mm256_packs_epi32((__m256i)first, (__m256i)second);
    *(__m256i *)to = _mm256_permute4x64_epi64(packed, 0xd8);
#else
    ((shorts_of_vec *)to)[0] = __builtin_convertvector(first, shorts_of_vec);
    ((shorts_of_vec *)to)[1] = __builtin_convertvector(second, shorts_of_vec);
#endif
}

/* Stores the codes of a key or value, of WIDTH channels from `channel` on; returns whether it is finite.
   head_codes are all keys or values of a KV head. */
INLINE int store_kv_codes(int is_value, int16_t *head_codes, int64_t position, int dim, int channel,
                          const float *limits, vec values) {
    int levels = is_value ? VALUE_LEVELS : KEY_LEVELS;
    vec scaled = values * ((float)levels / *(const unaligned_vec *)(limits + channel));
    scaled = min_of(broadcast(levels), max_of(broadcast(-levels), scaled));
    shorts_of_vec codes = __builtin_convertvector(round_to_ints(scaled), shorts_of_vec);
    int is_finite = max_magnitude_bits(1, &values) < INFINITY_BITS;
    if (!is_value) {
        *(shorts_of_vec *)(head_codes + position * dim + channel) = codes;
        return is_finite;
    }
    int16_t *to = head_codes + (position - position % 2) * dim + 2 * channel + position % 2;
    for (int i = 0; i < WIDTH; i++) to[2 * i] = codes[i];
    return is_finite;
}

/* ---- Scores ---- */

/* Rounds the queries of a task, multiplied by the scales of the key channels. A row that is not finite gets a
   total of NaN, which makes its results NaN; one that is almost 0 gets codes of 0. */
INLINE void round_queries(const Task *task, AttentionState *state) {
    int dim = task->dim;
    for (int r = 0; r < task->num_rows; r++) {
        vec values[MAX_HEAD_DIM / WIDTH], magnitudes = {};
        for (int v = 0; v < dim / WIDTH; v++) {
            vec limits = *(const unaligned_vec *)(task->key_limits + v * WIDTH);
            values[v] = load(task->queries[r] + v * WIDTH) * limits * (1.0f / KEY_LEVELS);
            magnitudes += max_of(values[v], -values[v]);
        }
        float sum = reduce_sum(magnitudes);
        float code_sum = QUERY_SUM - dim / 2; /* rounding may add 0.5 per code */
        int is_normal = sum > 1e-30f && sum < 1e38f;
        float inverse = is_normal ? code_sum / sum : 0;
        shorts_of_vec *codes = (shorts_of_vec *)(state->queries + r * (dim / 2));
        for (int v = 0; v < dim / WIDTH; v++)
            codes[v] = __builtin_convertvector(round_to_ints(values[v] * inverse), shorts_of_vec);
        state->scale[r] = is_normal ? sum / code_sum : 0;
        if (!(sum < 1e38f)) state->total[r] = NAN;
    }
}

/* Scores of `rows` queries, from row `first` of the task, for a block of keys. */
INLINE void compute_scores_in_integers(int rows, const Task *task, int first, int num_keys,
                                       AttentionState *state) {
    int depth = task->dim / 2;
    const lane *queries = state->queries + first * depth;
    for (int group = 0; group < (num_keys + PANEL - 1) / PANEL * 2; group += TILE_VECS) {
        const uvec *keys = (const uvec *)state->keys + group * depth;
        Partial sums[TILE_ROWS][TILE_VECS];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < TILE_VECS; v++) sums[r][v] = (Partial){};
#pragma GCC unroll 4
        for (int k = 0; k < depth; k++)
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < TILE_VECS; v++)
                    add_wide(&sums[r][v], keys[v * depth + k], (uvec){} + queries[r * depth + k]);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < TILE_VECS; v++)
                /* Q8_0 stands for sums of `add_wide`. */
                state->weights[r][group + v] = (vec)total_of(Q8_0, PAIRWISE, &sums[r][v]);
    }
}

/* ---- Softmax ---- */

/* MAX_WEIGHT * 2^(below * scale), rounded to integers. `below` is the score minus the highest of its block,
   at most 0; it is raised to `lowest`. The polynomial is within 0.01 %. */
INLINE ivec integer_weights(ivec below, ivec lowest, vec scale) {
    vec x = __builtin_convertvector(max_of_ints(below, lowest), vec);
    vec shifted = fma_of(x, scale, broadcast(ROUND_SHIFT)), exponent = shifted - ROUND_SHIFT;
    vec fraction = fma_of(x, scale, -exponent), p = broadcast(MAX_WEIGHT * 5.517167031e-2f);
    p = fma_of(p, fraction, broadcast(MAX_WEIGHT * 2.426111252e-1f));
    p = fma_of(p, fraction, broadcast(MAX_WEIGHT * 6.932609853e-1f));
    p = fma_of(p, fraction, broadcast(MAX_WEIGHT * 9.999280730e-1f));
    return round_to_ints((vec)((ivec)p + ((ivec)shifted << 23))); /* adds to the exponent of p */
}

/* Replaces the scores of `rows` rows, from row `first` of the task, by weights of 16 bits, relative to the
   row's highest score in the block. `grow` are the factors that make them relative to the highest score so
   far, `shrink` those that rescale the rows' sums so far. Keys start at position `block`. */
INLINE void update_softmax_in_integers(int rows, const Task *task, int first, int block, int num_keys,
                                       AttentionState *state, float shrink[], float grow[]) {
    int num_vecs = (num_keys + PANEL - 1) / PANEL * 2;
    vec partial[WIDTH], lanes[WIDTH];
    ivec lane_ids = counting_from(0);
    for (int r = rows; r < WIDTH; r++) partial[r] = (vec){};
    for (int r = 0; r < rows; r++) {
        ivec *scores = (ivec *)state->weights[r];
        int visible = task->visible[first + r] - block;
        for (int v = visible < 0 ? 0 : visible / WIDTH; v < num_vecs; v++) {
            ivec is_visible = lane_ids + v * WIDTH < visible;
            scores[v] = (is_visible & scores[v]) | (~is_visible & MASKED_SCORE);
        }
        partial[r] = (vec)scores[0];
        for (int v = 1; v < num_vecs; v++)
            partial[r] = (vec)max_of_ints((ivec)partial[r], scores[v]);
    }
    /* Transposed, a reduction over the lanes of each row is one over vectors, for all rows at once. */
    transpose_square(partial, lanes);
    ivec top = (ivec)lanes[0];
    for (int i = 1; i < WIDTH; i++) top = max_of_ints(top, (ivec)lanes[i]);
    vec scale = *(const unaligned_vec *)(state->scale + first);
    vec old = *(const unaligned_vec *)(state->highest + first);
    vec top_score = __builtin_convertvector(top, vec) * scale, highest = max_of(top_score, old);
    vec factor = exp2_of(old - highest), growth = exp2_of(top_score - highest);
    /* The scale of a row may be 0: -infinity becomes INT32_MIN. */
    vec lowest_float = max_of(broadcast((float)INT32_MIN), (float)LOWEST_EXPONENT / scale);
    ivec lowest = __builtin_convertvector(lowest_float, ivec);
    for (int r = 0; r < rows; r++) {
        ivec sum = {}, *scores = (ivec *)state->weights[r], row_top = (ivec){} + top[r];
        ivec row_lowest = (ivec){} + lowest[r];
        vec row_scale = broadcast(scale[r]);
        int visible = task->visible[first + r] - block;
        for (int v = 0; v < num_vecs; v += 2) {
            ivec codes[2];
            for (int i = 0; i < 2; i++)
                codes[i] = integer_weights(scores[v + i] - row_top, row_lowest, row_scale);
            if (visible < (v + 2) * WIDTH)
                for (int i = 0; i < 2; i++) codes[i] &= lane_ids + (v + i) * WIDTH < visible;
            sum += codes[0] + codes[1];
            store_shorts((shorts_of_vec *)scores + v, codes[0], codes[1]);
        }
        partial[r] = (vec)sum;
    }
    transpose_square(partial, lanes);
    ivec sum = (ivec)lanes[0];
    for (int i = 1; i < WIDTH; i++) sum += (ivec)lanes[i];
    vec total = *(const unaligned_vec *)(state->total + first) * factor;
    total = fma_of(__builtin_convertvector(sum, vec), growth, total);
    for (int r = 0; r < rows; r++) {
        state->highest[first + r] = highest[r], state->total[first + r] = total[r];
        shrink[r] = factor[r], grow[r] = growth[r];
    }
}

/* ---- Values ---- */

/* sums = sums * shrink + weights @ values * grow, for `rows` rows and `vecs` vectors of D from `at` on.
   Prefetches as many values of the next block. */
INLINE void weighted_sum_in_integers(int rows, int vecs, const char *values, const char *next, int num_keys,
                                     int dim, int at, const vec (*weights)[KEY_BLOCK / WIDTH],
                                     const float shrink[], const float grow[], vec *sums) {
    Partial acc[TILE_ROWS][4];
    sums += at;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) acc[r][v] = (Partial){};
#pragma GCC unroll 4
    for (int pair = 0; pair < (num_keys + 1) / 2; pair++) {
        int64_t from = ((int64_t)pair * (dim / WIDTH) + at) * sizeof(vec);
        const vec *value = (const vec *)(values + from);
        prefetch(next + from, vecs * sizeof(vec));
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vecs; v++)
                add_wide(&acc[r][v], (uvec)value[v], (uvec){} + ((const lane *)weights[r])[pair]);
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) {
            vec *sum = sums + r * (dim / WIDTH) + v;
            vec added = __builtin_convertvector(total_of(Q8_0, PAIRWISE, &acc[r][v]), vec);
            *sum = fma_of(added, broadcast(grow[r]), *sum * shrink[r]);
        }
}

/* Adds the weighted values of a block to the sums of `rows` rows, from row `first` of the task. */
INLINE void add_values_in_integers(int rows, const Task *task, int first, const char *values,
                                   const char *next, int num_keys, const float shrink[],
                                   const float grow[], AttentionState *state) {
    const vec(*weights)[KEY_BLOCK / WIDTH] = (const vec(*)[KEY_BLOCK / WIDTH])state->weights;
    int dim = task->dim, at = 0, num_vecs = dim / WIDTH; /* an even number */
    vec *sums = state->sums + first * num_vecs;
    if (rows <= FEW_ROWS)
        for (; at + 2 * TILE_VECS <= num_vecs; at += 2 * TILE_VECS)
            weighted_sum_in_integers(rows, 2 * TILE_VECS, values, next, num_keys, dim, at, weights, shrink,
                                     grow, sums);
    for (; at < num_vecs; at += TILE_VECS)
        weighted_sum_in_integers(rows, TILE_VECS, values, next, num_keys, dim, at, weights, shrink, grow,
                                 sums);
}

/* The scales of a vector of the weighted sums. */
INLINE vec value_scales(const Task *task, int vector) {
    return *(const unaligned_vec *)(task->value_limits + vector * WIDTH) * (1.0f / VALUE_LEVELS);
}
