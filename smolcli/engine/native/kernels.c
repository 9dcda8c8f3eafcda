/* One forward pass of a Llama over the tokens of many sequences, and the choice of the next token.

   Built for this machine when first needed (build.py), once with BF16=1 and once with BF16=0. All
   matrices are packed into panels of PANEL columns, so that a step reads each weight once, in order.

   Whatever shares a batch changes no bit of a row: every sum runs over its terms in one order, however
   many rows are computed together. Softmax and norms are in float32, and so is what layers add to.

   "Elements" are what weights and the cache hold, bfloat16 or float32; "lanes" are 4 bytes of them. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#if BF16
#ifndef __AVX512BF16__
#error "no instructions for bfloat16"
#endif
#include <immintrin.h>
typedef uint16_t elem;
#else
typedef float elem;
#endif

#ifdef __AVX512F__
enum { WIDTH = 16, TILE_ROWS = 12 };
#else
enum { WIDTH = 8, TILE_ROWS = 6 };
#endif
enum { PANEL = 2 * WIDTH, ELEMS = 4 / sizeof(elem), VALUE_ROWS = TILE_ROWS / 2 };

typedef uint32_t lane;
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef vec loose __attribute__((aligned(4))); /* a vec anywhere in an array */

#define INLINE static inline __attribute__((always_inline))

/* The weights of one layer; matrices are packed, norms are float32. */
typedef struct {
    const lane *qkv, *out, *gate_up, *down;
    const float *input_norm, *mlp_norm;
} Layer;

typedef struct {
    int32_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim, vocab, num_threads;
    float eps;
    const Layer *layers;
    const lane *embed, *head; /* packed, the same where they are tied */
    const float *norm;
    const float *cos, *sin; /* (positions, head_dim / 2) */
} Model;

/* Neighbouring rows of the batch that are tokens of one sequence, from position `start` on.
   cache is (2, layers, kv_heads, length, head_dim), keys first. */
typedef struct {
    int32_t first_row, num_rows, start, length;
    elem *cache;
} Span;

/* Space for the intermediate values of R rows; scores is (threads, TILE_ROWS, the longest length). */
typedef struct {
    float *x;      /* (R, hidden), what layers add to */
    elem *normed;  /* (R, hidden) */
    float *qkv;    /* (R, panels of q, k and v) */
    elem *queries; /* (R, num_heads, head_dim) */
    elem *mixed;   /* (R, num_heads, head_dim) */
    elem *act;     /* (R, intermediate) */
    float *scores;
    int64_t scores_stride; /* of one thread */
} Space;

const int32_t width = WIDTH;
const int32_t tile_rows = TILE_ROWS;

INLINE int min_int(int a, int b) { return a < b ? a : b; }

INLINE vec spread(float value) { return (vec){} + value; }

INLINE vec spread_lane(lane value) { return (vec)((ivec){} + (int32_t)value); }

INLINE vec pick(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* The sum of acc and the products of two lanes' elements. */
INLINE vec dot(vec acc, vec a, vec b) {
#if BF16
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    return acc + a * b;
#endif
}

INLINE vec load(const elem *from) {
#if BF16
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_epi16(from)), 16);
#else
    return *(const loose *)from;
#endif
}

INLINE void store(elem *to, vec value) {
#if BF16
    _mm256_storeu_epi16(to, (__m256i)_mm512_cvtneps_pbh((__m512)value)); /* ties to even */
#else
    *(loose *)to = value;
#endif
}

INLINE float sum_of(vec value) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += value[i];
    return sum;
}

INLINE float max_of(vec value) {
    float max = value[0];
    for (int i = 1; i < WIDTH; i++) max = value[i] > max ? value[i] : max;
    return max;
}

/* e^x, 0 below -87 and e^88 above 88; to 2 units in the last place (Cephes, S. Moshier). */
INLINE vec exp_of(vec x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    x = pick(x > 88.0f, spread(88.0f), x);
    vec shifted = x * 1.44269504f + round, n = shifted - round;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = spread(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = ((ivec)shifted - (ivec)spread(round)) << 23;
    return pick(x > -87.0f, (vec)((ivec)p + exponent), (vec){});
}

/* Products of up to TILE_ROWS rows of x with one panel; prefetches a share of what comes next. */
INLINE void tile(int rows, const lane *panel, int depth, const lane *x, const char *next,
                 int next_step, vec acc[][2]) {
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (vec){};
    for (int k = 0; k < depth; k++) {
        vec first = *(const vec *)(panel + k * PANEL);
        vec second = *(const vec *)(panel + k * PANEL + WIDTH);
        __builtin_prefetch(next + ((k * next_step) >> 8) * 64, 0, 2);
        for (int r = 0; r < rows; r++) {
            vec value = spread_lane(x[r * depth + k]);
            sum[r][0] = dot(sum[r][0], first, value);
            sum[r][1] = dot(sum[r][1], second, value);
        }
    }
    for (int r = 0; r < rows; r++) acc[r][0] = sum[r][0], acc[r][1] = sum[r][1];
}

/* Call with ROWS as a constant, so that the compiler keeps all sums in registers. */
#define CASE(n, call) \
    case n: { \
        enum { ROWS = n <= TILE_ROWS ? n : 1 }; \
        call; \
        break; \
    }
#define FOR_ROWS(rows, call) \
    switch (rows) { \
        CASE(1, call) CASE(2, call) CASE(3, call) CASE(4, call) CASE(5, call) CASE(6, call) \
        CASE(7, call) CASE(8, call) CASE(9, call) CASE(10, call) CASE(11, call) CASE(12, call) \
    }

static void any_tile(int rows, const lane *panel, int depth, const lane *x, const char *next,
                     int next_step, vec acc[][2]) {
    FOR_ROWS(rows, tile(ROWS, panel, depth, x, next, next_step, acc))
}

/* The best logit of each of a thread's WIDTH lanes so far, and whose it is. */
typedef struct {
    vec value;
    ivec id;
} Best;

/* What becomes of the products. */
typedef enum { STORE, ADD, SWIGLU, BEST } Use;

typedef struct {
    Use use;
    float *out; /* STORE, ADD: (rows, stride) */
    elem *act;  /* SWIGLU: (rows, stride) */
    Best *best; /* BEST: (rows,) of this thread */
    const uint8_t *allowed; /* BEST: a bit for each token, (rows, stride bytes), or none */
    int64_t stride;
    int32_t vocab;
} Target;

INLINE void keep_best(const Target *to, int row, vec value, int first_id) {
    Best *best = to->best + row;
    ivec places = {};
    for (int i = 0; i < WIDTH; i++) places[i] = i;
    ivec ids = places + first_id;
    ivec better = (value > best->value) & (ids < to->vocab);
    if (to->allowed) {
        const uint8_t *bytes = to->allowed + row * to->stride + first_id / 8;
        int32_t bits = WIDTH == 16 ? bytes[0] | bytes[1] << 8 : bytes[0];
        better &= (((ivec){} + bits) >> places & 1) != 0;
    }
    best->value = pick(better, value, best->value);
    best->id = (better & ids) | (~better & best->id);
}

INLINE void put(const Target *to, int row, int panel, vec first, vec second) {
    if (to->use == SWIGLU) {
        vec gate = first / (exp_of(-first) + 1.0f);
        store(to->act + row * to->stride + panel * WIDTH, gate * second);
    } else if (to->use == BEST) {
        keep_best(to, row, first, panel * PANEL);
        keep_best(to, row, second, panel * PANEL + WIDTH);
    } else {
        loose *out = (loose *)(to->out + row * to->stride + panel * PANEL);
        if (to->use == ADD) first += out[0], second += out[1];
        out[0] = first, out[1] = second;
    }
}

/* x @ weight.T for (rows, depth lanes) and packed weights, on all threads of the region. */
static void multiply(const lane *weight, int num_panels, int depth, const elem *x, int rows,
                     const Target *to) {
    int num_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    int next_step = (2 * WIDTH * 4 << 8) / 64 / num_tiles; /* lines of the next panel for each k */
#pragma omp for schedule(static)
    for (int item = 0; item < num_panels * num_tiles; item++) {
        int panel = item / num_tiles, number = item % num_tiles;
        int first = number * rows / num_tiles, end = (number + 1) * rows / num_tiles;
        const lane *at = weight + (int64_t)panel * depth * PANEL;
        const char *next = (const char *)(at + (int64_t)depth * PANEL);
        next += ((int64_t)number * depth * next_step >> 8) * 64;
        vec acc[TILE_ROWS][2];
        any_tile(end - first, at, depth, (const lane *)x + (int64_t)first * depth, next, next_step,
                 acc);
        for (int r = first; r < end; r++) put(to, r, panel, acc[r - first][0], acc[r - first][1]);
    }
}

/* RMSNorm of (rows, hidden). */
static void norm(const float *x, const float *weight, int rows, int hidden, float eps, elem *out) {
#pragma omp for schedule(static)
    for (int row = 0; row < rows; row++) {
        const float *from = x + (int64_t)row * hidden;
        vec squares = {};
        for (int i = 0; i < hidden; i += WIDTH) {
            vec value = *(const loose *)(from + i);
            squares += value * value;
        }
        float scale = 1.0f / sqrtf(sum_of(squares) / hidden + eps);
        for (int i = 0; i < hidden; i += WIDTH)
            store(out + (int64_t)row * hidden + i,
                  *(const loose *)(from + i) * scale * *(const loose *)(weight + i));
    }
}

static void embed(const Model *model, const int32_t *token_ids, int rows, float *x) {
    int depth = model->hidden / ELEMS;
#pragma omp for schedule(static)
    for (int row = 0; row < rows; row++) {
        int id = token_ids[row];
        const lane *from = model->embed + (int64_t)(id / PANEL) * depth * PANEL + id % PANEL;
        for (int k = 0; k < depth; k++) {
            lane value = from[(int64_t)k * PANEL];
            for (int e = 0; e < ELEMS; e++) {
                lane bits = ELEMS == 2 ? (value >> (16 * e)) << 16 : value;
                memcpy(x + (int64_t)row * model->hidden + k * ELEMS + e, &bits, 4);
            }
        }
    }
}

/* Rotate one head by its position: pairs are (i, i + head_dim / 2). */
INLINE void rotate(const float *from, const float *cos, const float *sin, int half, float scale,
                   elem *to) {
    for (int i = 0; i < half; i += WIDTH) {
        vec a = *(const loose *)(from + i), b = *(const loose *)(from + half + i);
        vec c = *(const loose *)(cos + i) * scale, s = *(const loose *)(sin + i) * scale;
        store(to + i, a * c - b * s);
        store(to + half + i, b * c + a * s);
    }
}

/* Rotated queries to their place, rotated keys and values to the cache. */
static void place(const Model *model, int layer, const Span *spans, const int32_t *span_of_row,
                  int rows, const Space *space, int64_t qkv_stride) {
    int dim = model->head_dim, heads = model->num_heads, kv_heads = model->num_kv_heads;
    float scale = 1.0f / sqrtf(dim);
#pragma omp for schedule(static)
    for (int row = 0; row < rows; row++) {
        const Span *span = spans + span_of_row[row];
        int64_t position = span->start + row - span->first_row;
        const float *cos = model->cos + position * (dim / 2), *sin = model->sin + position * (dim / 2);
        const float *from = space->qkv + row * qkv_stride;
        for (int h = 0; h < heads; h++)
            rotate(from + h * dim, cos, sin, dim / 2, scale, space->queries + (row * heads + h) * dim);
        int64_t values = (int64_t)model->num_layers * kv_heads * span->length * dim;
        for (int h = 0; h < kv_heads; h++) {
            int64_t at = (((int64_t)layer * kv_heads + h) * span->length + position) * dim;
            rotate(from + (heads + h) * dim, cos, sin, dim / 2, 1.0f, span->cache + at);
            const float *value = from + (heads + kv_heads + h) * dim;
            for (int i = 0; i < dim; i += WIDTH)
                store(span->cache + values + at + i, *(const loose *)(value + i));
        }
    }
}

/* Up to TILE_ROWS queries of one sequence and one head of keys and values. */
typedef struct {
    const elem *keys, *values; /* (length, head_dim) */
    int num_keys, num_rows;
    const elem *queries[TILE_ROWS]; /* (head_dim,) each */
    elem *out[TILE_ROWS];
    int visible[TILE_ROWS]; /* how many keys each may see */
} Task;

/* WIDTH keys, so that the same lane of all is one vector. */
INLINE void transpose(const elem *keys, int depth, vec out[]) {
    const lane *from = (const lane *)keys;
    for (int k = 0; k < depth; k++)
        for (int i = 0; i < WIDTH; i++) ((lane *)(out + k))[i] = from[i * depth + k];
}

INLINE void score(int rows, const Task *task, int depth, int64_t stride, float *scores) {
    vec block[256];
    for (int at = 0; at < task->num_keys; at += WIDTH) {
        transpose(task->keys + (int64_t)at * depth * ELEMS, depth, block);
        vec sum[TILE_ROWS];
        for (int r = 0; r < rows; r++) sum[r] = (vec){};
        for (int k = 0; k < depth; k++)
            for (int r = 0; r < rows; r++)
                sum[r] = dot(sum[r], block[k], spread_lane(((const lane *)task->queries[r])[k]));
        for (int r = 0; r < rows; r++) *(loose *)(scores + r * stride + at) = sum[r];
    }
}

/* Scores to weights that are not divided by their sum yet; returns the sum. */
INLINE float soften(float *scores, int visible, int num_keys) {
    for (int i = visible; i < num_keys || i % WIDTH; i++) scores[i] = -INFINITY;
    vec highest = spread(-INFINITY), sum = {};
    for (int i = 0; i < visible; i += WIDTH) {
        vec value = *(loose *)(scores + i);
        highest = pick(value > highest, value, highest);
    }
    float top = max_of(highest);
    for (int i = 0; i < num_keys; i += WIDTH) {
        vec value = exp_of(*(loose *)(scores + i) - top);
        *(loose *)(scores + i) = value;
        sum += value;
    }
    return sum_of(sum);
}

/* Weighted sums of `vecs` vectors of each value, for some of the task's rows. */
INLINE void mix(int rows, int vecs, const Task *task, int first, int dim, int from, int64_t stride,
                const float *scores, const float *sums) {
    vec acc[VALUE_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) acc[r][v] = (vec){};
    for (int s = 0; s < task->num_keys; s++) {
        for (int v = 0; v < vecs; v++) {
            vec value = load(task->values + (int64_t)s * dim + from + v * WIDTH);
            for (int r = 0; r < rows; r++) acc[r][v] += value * scores[(first + r) * stride + s];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++)
            store(task->out[first + r] + from + v * WIDTH, acc[r][v] * (1.0f / sums[first + r]));
}

static void mix_rows(int rows, const Task *task, int first, int dim, int64_t stride,
                     const float *scores, const float *sums) {
    int from = 0;
    for (; from + 4 * WIDTH <= dim; from += 4 * WIDTH)
        FOR_ROWS(rows, mix(ROWS <= VALUE_ROWS ? ROWS : 1, 4, task, first, dim, from, stride, scores, sums))
    for (; from < dim; from += WIDTH)
        FOR_ROWS(rows, mix(ROWS <= VALUE_ROWS ? ROWS : 1, 1, task, first, dim, from, stride, scores, sums))
}

static void attend_task(const Task *task, int dim, int64_t stride, float *scores) {
    float sums[TILE_ROWS];
    FOR_ROWS(task->num_rows, score(ROWS, task, dim / ELEMS, stride, scores))
    for (int r = 0; r < task->num_rows; r++)
        sums[r] = soften(scores + r * stride, task->visible[r], task->num_keys);
    for (int first = 0; first < task->num_rows; first += VALUE_ROWS)
        mix_rows(min_int(VALUE_ROWS, task->num_rows - first), task, first, dim, stride, scores, sums);
}

static void attend(const Model *model, int layer, const Span *spans, const int32_t *tasks,
                   int num_tasks, const Space *space) {
    int dim = model->head_dim, heads = model->num_heads, kv_heads = model->num_kv_heads;
    int group = heads / kv_heads;
    float *scores = space->scores + omp_get_thread_num() * space->scores_stride;
    int chunk = num_tasks < 4 * model->num_threads ? 1 : kv_heads; /* neighbours in memory */
#pragma omp for schedule(dynamic, chunk)
    for (int item = 0; item < num_tasks * kv_heads; item++) {
        const int32_t *which = tasks + 3 * (item / kv_heads); /* span, its first and end row here */
        const Span *span = spans + which[0];
        int head = item % kv_heads;
        Task task = {.num_keys = span->start + which[2]};
        task.keys = span->cache + ((int64_t)layer * kv_heads + head) * span->length * dim;
        task.values = task.keys + (int64_t)model->num_layers * kv_heads * span->length * dim;
        for (int row = which[1]; row < which[2]; row++)
            for (int h = head * group; h < (head + 1) * group; h++) {
                int64_t at = ((int64_t)(span->first_row + row) * heads + h) * dim;
                task.queries[task.num_rows] = space->queries + at;
                task.out[task.num_rows] = space->mixed + at;
                task.visible[task.num_rows++] = span->start + row + 1;
            }
        int64_t stride = space->scores_stride / TILE_ROWS;
        attend_task(&task, dim, stride, scores);
    }
}

/* The hidden states of all rows after the last layer, into space->x.

   tasks is (num_tasks, 3): a span, and from which to which of its rows, at most TILE_ROWS / group. */
void forward(const Model *model, const int32_t *token_ids, const int32_t *span_of_row, int rows,
             const Span *spans, const int32_t *tasks, int num_tasks, const Space *space) {
    int hidden = model->hidden, depth = hidden / ELEMS, inner = model->num_heads * model->head_dim;
    int qkv_panels =
        ((model->num_heads + 2 * model->num_kv_heads) * model->head_dim + PANEL - 1) / PANEL;
    Target qkv = {STORE, .out = space->qkv, .stride = (int64_t)qkv_panels * PANEL};
    Target residual = {ADD, .out = space->x, .stride = hidden};
    Target act = {SWIGLU, .act = space->act, .stride = model->intermediate};
#pragma omp parallel num_threads(model->num_threads)
    {
        embed(model, token_ids, rows, space->x);
        for (int i = 0; i < model->num_layers; i++) {
            const Layer *layer = model->layers + i;
            norm(space->x, layer->input_norm, rows, hidden, model->eps, space->normed);
            multiply(layer->qkv, qkv_panels, depth, space->normed, rows, &qkv);
            place(model, i, spans, span_of_row, rows, space, qkv.stride);
            attend(model, i, spans, tasks, num_tasks, space);
            multiply(layer->out, hidden / PANEL, inner / ELEMS, space->mixed, rows, &residual);
            norm(space->x, layer->mlp_norm, rows, hidden, model->eps, space->normed);
            multiply(layer->gate_up, model->intermediate / WIDTH, depth, space->normed, rows, &act);
            multiply(layer->down, hidden / PANEL, model->intermediate / ELEMS, space->act, rows,
                     &residual);
        }
    }
}

/* Scores of the whole vocabulary for (rows, hidden), into (rows, vocab rounded up to panels). */
void logits(const Model *model, const float *hidden, int rows, elem *normed, float *out) {
    int num_panels = (model->vocab + PANEL - 1) / PANEL;
    Target to = {STORE, .out = out, .stride = (int64_t)num_panels * PANEL};
#pragma omp parallel num_threads(model->num_threads)
    {
        norm(hidden, model->norm, rows, model->hidden, model->eps, normed);
        multiply(model->head, num_panels, model->hidden / ELEMS, normed, rows, &to);
    }
}

/* The most likely token of each row, of equals the first, -1 where no logit is a number.

   allowed has a bit for each token, (rows, whole panels), or is null; best has (threads, rows) of
   Best's size. */
void best(const Model *model, const float *hidden, int rows, const uint8_t *allowed, elem *normed,
          Best *best, int32_t *ids) {
    int num_panels = (model->vocab + PANEL - 1) / PANEL;
    for (int64_t i = 0; i < (int64_t)rows * model->num_threads; i++)
        best[i] = (Best){spread(-INFINITY), (ivec){} - 1};
#pragma omp parallel num_threads(model->num_threads)
    {
        Target to = {BEST, .allowed = allowed, .stride = num_panels * PANEL / 8, .vocab = model->vocab};
        to.best = best + (int64_t)omp_get_thread_num() * rows;
        norm(hidden, model->norm, rows, model->hidden, model->eps, normed);
        multiply(model->head, num_panels, model->hidden / ELEMS, normed, rows, &to);
    }
    for (int row = 0; row < rows; row++) {
        float top = -INFINITY;
        ids[row] = -1;
        for (int t = 0; t < model->num_threads; t++) {
            const Best *found = best + (int64_t)t * rows + row;
            for (int i = 0; i < WIDTH; i++) {
                int is_first = found->value[i] == top && found->id[i] < ids[row];
                if (found->id[i] >= 0 && (found->value[i] > top || is_first)) {
                    top = found->value[i];
                    ids[row] = found->id[i];
                }
            }
        }
    }
}
