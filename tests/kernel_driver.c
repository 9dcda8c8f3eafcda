/* Runs the kernels on a small random model without Python, for other architectures (under qemu), other
   vector widths, and sanitizers.

     driver THREADS FORMAT [INTEGERS]
                                  print hidden states and tokens of a few steps; INTEGERS selects the
                                  instructions of integer products, as numbered in int8_products.h
     driver stress STEPS SEED     many steps over changing sequences and teams, beside busy and
                                  sleeping threads; a sequence must get the same bits in all of them.
                                  A long run may be split over seeds; even ones compute in integers

   Weights are exact in bfloat16 and in all quantized formats, and do not depend on the layout, so all
   builds compute the same model from matrices in any format, by its number in kernels.c. */

#define _GNU_SOURCE
#include "../smolcli/engine/native/kernels.c"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    LAYERS = 2, HIDDEN = 96, INTERMEDIATE = 96, HEADS = 6, KV_HEADS = 2, DIM = 32, VOCAB = 70,
    POSITIONS = 256, NUM_SEQUENCES = 5, LENGTH = 160, MAX_ROWS = 512, MAX_COLUMNS = HEADS * DIM,
    MAX_THREADS_USED = 8, ALL = (1 << NUM_SEQUENCES) - 1
};

static const int PROMPT_LENGTHS[NUM_SEQUENCES] = {1, 150, 64, 7, 65};

static uint32_t hash_of(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t x = a * 0x9e3779b1u ^ b * 0x85ebca77u ^ c * 0xc2b2ae3du;
    x ^= x >> 15, x *= 0x2c1b3c6du, x ^= x >> 12, x *= 0x297a2d39u, x ^= x >> 15;
    return x;
}

/* The integer of a weight, -8 to 7, and the scale of its group. */
static int code_at(int matrix, int row, int column) { return (int)(hash_of(matrix, row, column) % 16) - 8; }

static float scale_at(int matrix, int row, int column) {
    return (1 + hash_of(matrix + 1000, row, column / GROUP) % 3) / 64.0f;
}

static float weight_at(int matrix, int row, int column) {
    return code_at(matrix, row, column) * scale_at(matrix, row, column);
}

static void *aligned(size_t size) {
    void *memory = aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    memset(memory, 0, size);
    return memory;
}

/* The row of the matrix that is packed row `row`: the second half of each pair of vectors comes from
   `distance` rows further on. */
static int source_row(int row, int distance) {
    int group = row / (2 * distance) * 2 * distance, within = row % (2 * distance);
    int pair = within / PANEL, second = within % PANEL / WIDTH;
    return group + second * distance + pair * WIDTH + within % WIDTH;
}

/* distance: 0 keeps the order of rows. */
static Matrix pack_dense(int matrix, int rows, int columns, int distance) {
    int panels = (rows + PANEL - 1) / PANEL;
    lane *packed = aligned((size_t)panels * PANEL * columns / WEIGHTS * 4);
    for (int row = 0; row < rows; row++)
        for (int column = 0; column < columns; column++) {
            float value = weight_at(matrix, distance ? source_row(row, distance) : row, column);
            uint32_t bits;
            memcpy(&bits, &value, 4);
            lane *to = packed + ((size_t)row / PANEL * (columns / WEIGHTS) + column / WEIGHTS) * PANEL +
                       row % PANEL;
            *to |= WEIGHTS == 2 ? bits >> 16 << 16 * (column % 2) : bits;
        }
    return (Matrix){packed, DENSE, 0};
}

/* float16, for values that it has exactly. */
static uint16_t half_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value == 0 ? 0 : bits >> 16 & 0x8000 | ((bits >> 23 & 255) - 112) << 10 | bits >> 13 & 1023;
}

static void set_number(Format format, char *group, int index, float value) {
    if (has_float_scales(format))
        ((float *)group)[index] = value;
    else
        ((uint16_t *)group)[index] = half_of(value);
}

static Matrix pack_quantized(int matrix, int rows, int columns, int distance, Format format) {
    int panels = (rows + PANEL - 1) / PANEL, bits = weight_bits(format), in_word = 32 / bits;
    char *packed = aligned(panels * panel_bytes(format, columns));
    for (int row = 0; row < rows; row++)
        for (int column = 0; column < columns; column++) {
            int source = distance ? source_row(row, distance) : row, within = row % PANEL;
            char *group = packed + row / PANEL * panel_bytes(format, columns) +
                          column / group_size(format) * group_bytes(format);
            float scale = scale_at(matrix, source, column);
            set_number(format, group, within, scale);
            if (has_offsets(format)) set_number(format, group, PANEL + within, -8 * scale);
            uint32_t *words = (uint32_t *)(group + scale_bytes(format));
            uint32_t code = code_at(matrix, source, column) + (has_offsets(format) ? 8 : 1 << (bits - 1));
            words[column % group_size(format) / in_word * PANEL + within] |= code << bits * (column % in_word);
        }
    return (Matrix){packed, format, 0};
}

static Matrix pack(int matrix, int rows, int columns, int distance, Format format) {
    if (format == DENSE) return pack_dense(matrix, rows, columns, distance);
    return pack_quantized(matrix, rows, columns, distance, format);
}

static float *vector(int matrix, int size, float offset) {
    float *values = aligned(size * sizeof *values);
    for (int i = 0; i < size; i++) values[i] = weight_at(matrix, 0, i) + offset;
    return values;
}

/* What the keys and values of a layer cannot exceed; see kv_limits in packing.py. */
static float *make_limits(int layer, const float *norm) {
    enum { SIZE = KV_HEADS * DIM };
    float *limits = aligned(2 * SIZE * sizeof *limits);
    for (int i = 0; i < 2 * SIZE; i++) {
        float square = 0;
        for (int column = 0; column < HIDDEN; column++) {
            float weight = weight_at(10 * layer + 1, HEADS * DIM + i, column) * norm[column];
            square += weight * weight;
        }
        limits[i] = sqrtf(HIDDEN * square) * 1.02f;
    }
    for (int i = 0; i < SIZE; i++) {
        float *pair = limits + i / DIM * DIM + i % (DIM / 2);
        if (i % DIM < DIM / 2) pair[0] = pair[DIM / 2] = hypotf(pair[0], pair[DIM / 2]);
    }
    return limits;
}

/* The lengths that bound logits; see row_lengths in packing.py. */
static float *make_lengths(Format format, int matrix) {
    if (BF16_WEIGHTS || format < Q4_0 || format > Q8_0) return NULL;
    int panels = (VOCAB + PANEL - 1) / PANEL;
    float *lengths = aligned(2 * panels * sizeof *lengths);
    for (int row = 0; row < VOCAB; row++) {
        float squares[2] = {};
        for (int column = 0; column < HIDDEN; column++) {
            float weight = weight_at(matrix, row, column), offset = 8 * scale_at(matrix, row, column);
            squares[0] += weight * weight;
            squares[1] += (weight + 2 * offset) * (weight + 2 * offset);
        }
        for (int i = 0; i < 2; i++) {
            float *longest = lengths + i * panels + row / PANEL;
            *longest = fmaxf(*longest, sqrtf(squares[i]) * 1.0001f);
        }
    }
    return lengths;
}

static Model make_model(Format format) {
    static Layer layers[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        const float *norm = vector(10 * i + 5, HIDDEN, 1);
        layers[i] = (Layer){pack(10 * i + 1, (HEADS + 2 * KV_HEADS) * DIM, HIDDEN, DIM / 2, format),
                            pack(10 * i + 2, HIDDEN, HEADS * DIM, 0, format),
                            pack(10 * i + 3, 2 * INTERMEDIATE, HIDDEN, INTERMEDIATE, format),
                            pack(10 * i + 4, HIDDEN, INTERMEDIATE, 0, format),
                            norm,
                            vector(10 * i + 6, HIDDEN, 1),
                            make_limits(i, norm)};
    }
    Matrix embed = pack(100, VOCAB, HIDDEN, 0, format);
    Model model = {.num_layers = LAYERS, .hidden = HIDDEN, .intermediate = INTERMEDIATE,
                   .num_heads = HEADS, .num_kv_heads = KV_HEADS, .head_dim = DIM, .vocab = VOCAB,
                   .eps = 1e-5f, .layers = layers, .embed = embed, .head = embed,
                   .norm = vector(101, HIDDEN, 1), .cos = vector(102, POSITIONS * DIM / 2, 0),
                   .sin = vector(103, POSITIONS * DIM / 2, 0),
                   .head_lengths = make_lengths(format, 100)};
    return model;
}

static Space make_space(void) {
    Space space = {.squares_stride = MAX_ROWS + WIDTH};
    space.x = aligned(MAX_ROWS * HIDDEN * 4);
    space.normed = aligned(MAX_ROWS * HIDDEN * 4);
    space.squares = aligned(HIDDEN / PANEL * space.squares_stride * 4);
    space.queries = aligned(MAX_ROWS * HEADS * DIM * 4);
    space.attended = aligned(MAX_ROWS * HEADS * DIM * 4);
    space.act = aligned(MAX_ROWS * INTERMEDIATE * 4);
    space.expanded_stride = sizeof(Expanded) + MAX_COLUMNS * PANEL * 4;
    space.expanded = aligned(MAX_THREADS_USED * space.expanded_stride);
    space.rounded = aligned(MAX_ROWS * (MAX_COLUMNS / GROUP) * rounded_bytes(Q8_0));
    return space;
}

typedef struct {
    Model model;
    Space space;
    elem *caches[NUM_SEQUENCES];
    float hidden[NUM_SEQUENCES][HIDDEN];
    int32_t ids[NUM_SEQUENCES];
} Run;

/* Reads the prompts of some sequences in one step, then the head.
   present: bit s is set if sequence s takes part. The values of the others stay as they are. */
static void step(Run *run, Team *team, unsigned present) {
    Span spans[NUM_SEQUENCES];
    int32_t tokens[MAX_ROWS], ids[NUM_SEQUENCES], plan[10 * MAX_ROWS];
    float hidden[NUM_SEQUENCES][HIDDEN];
    int rows = 0, count = 0;
    for (int s = 0; s < NUM_SEQUENCES; s++) {
        if (!(present >> s & 1)) continue;
        int length = PROMPT_LENGTHS[s];
        spans[count++] = (Span){rows, length, 1, 0, LENGTH, 0, (char *)run->caches[s]};
        for (int i = 0; i < length; i++) tokens[rows++] = hash_of(7, s, i) % VOCAB;
    }
    Batch batch = {tokens, spans, hidden[0], plan, count, rows, count, 0};
    if (smol_forward(team, &run->model, &batch, &run->space)) abort();
    Best *best = aligned(sizeof *best * NUM_SEQUENCES * team_num_threads(team));
    float bounds[(VOCAB / PANEL + 1 + MAX_THREADS_USED + 2) * NUM_SEQUENCES];
    int has_bounds = run->model.head_lengths && !run->model.integers;
    float *scratch = has_bounds ? bounds : NULL;
    if (smol_best(team, &run->model, hidden[0], count, NULL, &run->space, best, scratch, ids)) abort();
    free(best);
    for (int s = 0, i = 0; s < NUM_SEQUENCES; s++) {
        if (!(present >> s & 1)) continue;
        memcpy(run->hidden[s], hidden[i], sizeof hidden[i]);
        run->ids[s] = ids[i++];
    }
}

static void print(const Run *run) {
    for (int s = 0; s < NUM_SEQUENCES; s++) {
        printf("%d", run->ids[s]);
        for (int i = 0; i < HIDDEN; i++) printf(" %.9g", run->hidden[s][i]);
        printf("\n");
    }
}

/* Takes a core from the team for a while, again and again. */
static void *disturb(void *stop) {
    for (unsigned turn = 0; !__atomic_load_n((int *)stop, __ATOMIC_RELAXED); turn++) {
        usleep(hash_of(turn, 2, 2) % 4000);
        for (volatile int i = 0; i < (int)(hash_of(turn, 3, 3) % 200000); i++) {}
    }
    return NULL;
}

/* One to all of the sequences; most steps are small, as in decoding. */
static unsigned some(uint32_t seed, int turn) {
    unsigned present = 1u << hash_of(seed, turn, 4) % NUM_SEQUENCES;
    for (int s = 0; s < NUM_SEQUENCES; s++)
        if (hash_of(seed, turn, 5 + s) % 4 == 0) present |= 1u << s;
    return present;
}

static int stress(Run *run, int num_steps, uint32_t seed) {
    static const int THREADS[4] = {1, 2, 3, 5};
    enum { NUM_DISTURBING = 3, REPORTED = 250 /* steps between two lines of progress */ };
    pthread_t disturbing[NUM_DISTURBING];
    int stop = 0, num_wrong = 0;
    for (int i = 0; i < NUM_DISTURBING; i++) pthread_create(disturbing + i, NULL, disturb, &stop);
    Team *team = team_create(1);
    step(run, team, ALL);
    Run expected = *run;
    for (int i = 0; i < num_steps; i++) {
        if (hash_of(seed, i, 0) % 20 == 0) {
            team_destroy(team);
            team = team_create(THREADS[hash_of(seed, i, 1) % 4]);
        }
        if (hash_of(seed, i, 2) % 50 == 0) usleep(hash_of(seed, i, 3) % 1000);
        memset(run->hidden, 0, sizeof run->hidden);
        unsigned present = some(seed, i);
        step(run, team, present);
        for (int s = 0; s < NUM_SEQUENCES; s++)
            if (present >> s & 1)
                num_wrong += memcmp(run->hidden[s], expected.hidden[s], sizeof run->hidden[s]) ||
                             run->ids[s] != expected.ids[s];
        if ((i + 1) % REPORTED == 0 && i + 1 < num_steps)
            fprintf(stderr, "seed %u: %d of %d steps, %d wrong\n", seed, i + 1, num_steps, num_wrong);
    }
    team_destroy(team);
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (int i = 0; i < NUM_DISTURBING; i++) pthread_join(disturbing[i], NULL);
    printf("seed %u: %d steps, %d wrong\n", seed, num_steps, num_wrong);
    return num_wrong > 0;
}

int main(int argc, char **argv) {
    static Run *run;  /* static, so that the leak sanitizer finds what it points to */
    run = aligned(sizeof *run);
    int is_stress = argc == 4 && strcmp(argv[1], "stress") == 0;
    run->model = make_model(is_stress ? Q4_1 : argc > 2 ? atoi(argv[2]) : DENSE);
    run->model.integers = argc <= 3 ? 0 : is_stress ? (atoi(argv[3]) % 2 ? 0 : PAIRWISE) : atoi(argv[3]);
    run->space = make_space();
    for (int s = 0; s < NUM_SEQUENCES; s++)
        run->caches[s] = aligned((size_t)2 * LAYERS * KV_HEADS * LENGTH * DIM * sizeof(elem));
    if (is_stress) return stress(run, atoi(argv[2]), atoi(argv[3]));
    Team *team = team_create(argc > 1 ? atoi(argv[1]) : 1);
    step(run, team, ALL);
    print(run);
    team_destroy(team);
    return 0;
}
