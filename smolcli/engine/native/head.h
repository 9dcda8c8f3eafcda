/* The final norm and the LM head: logits, or only the most likely tokens. Included by kernels.c.

   The largest logit of a row is found without multiplying all panels in float32: products of integers, which
   are faster, bound each logit first. By the Cauchy-Schwarz inequality, rounding the inputs changes a product
   by at most the length of the change times the length of the column; the roundings of float32, whose number
   is known, are bounded in the same way. Only the panels whose upper bound for a row reaches the row's
   largest lower bound are then multiplied in float32, so the result is the same. Bounds apply to logits
   before the division by the RMS, which keeps their order. */

enum { PREPARE_HEAD, ROUND_HEAD, BOUND_HEAD, MULTIPLY_HEAD, HEAD_OPS };

/* Logits of (rows, H) hidden states, or the best of them. Uses only the buffers `normed`, `squares`,
   `expanded` and `rounded` of the space. */
typedef struct {
    const Model *model;
    const float *hidden;
    int rows;
    const Space *space;
    float *logits;          /* (rows, vocab rounded up to panels), or NULL */
    Best *best;             /* (threads, rows) */
    const uint8_t *allowed; /* one bit per token, (rows, whole panels), or NULL */
    float *upper;           /* (panels, rows), upper bounds; or NULL: multiply all panels as the model does */
    float *lower;           /* (threads, rows), the largest lower bounds */
    float *errors;          /* (2, rows), largest errors for columns of length 1; see model->head_lengths */
    int num_threads;
} HeadStep;

INLINE int num_head_panels(const Model *model) { return (model->vocab + PANEL - 1) / PANEL; }

/* The tokens of a vector that exist and are allowed. */
INLINE ivec allowed_tokens(const HeadStep *step, int row, ivec ids, int first_id) {
    ivec is_allowed = ids < step->model->vocab;
    if (step->allowed) {
        const uint8_t *bytes = step->allowed +
                               (int64_t)row * num_head_panels(step->model) * (PANEL / 8) + first_id / 8;
        int32_t bits = WIDTH == 16 ? bytes[0] | bytes[1] << 8 : bytes[0];
        is_allowed &= (((ivec){} + bits) >> (ids - first_id) & 1) != 0;
    }
    return is_allowed;
}

/* The larger logit wins, and the smaller id in a tie, in whichever order they are compared. */
INLINE void keep_best(const HeadStep *step, int row, vec value, int first_id, Best *best) {
    ivec ids = counting_from(first_id);
    ivec better = (value > best->value) | ((value == best->value) & (ids < best->id));
    better &= allowed_tokens(step, row, ids, first_id);
    best->value = select_lanes(better, value, best->value);
    best->id = (better & ids) | (~better & best->id);
    best->is_nan |= (value != value) & (ids < step->model->vocab);
}

/* The product of all rows; to find bounds, in integers, with instructions that all CPUs of a variant have. */
static Product head_product(const HeadStep *step) {
    const Model *model = step->model;
    return (Product){.weight = model->head,
                     .num_panels = num_head_panels(model),
                     .features = model->hidden,
                     .x = step->space->normed,
                     .rows = step->rows,
                     .space = step->space,
                     .integers = step->upper ? PAIRWISE : integers_of(model, &model->head)};
}

/* Bounds the errors of a row's products of integers; infinity if products could underflow or overflow. */
static void bound_errors(const HeadStep *step, int row) {
    int hidden = step->model->hidden, is_in_bytes = !is_wide(step->model->head.format);
    int subgroup = is_in_bytes ? SUBGROUP : GROUP, levels = is_in_bytes ? NARROW_LEVELS : WIDE_LEVELS;
    const elem *x = step->space->normed + (int64_t)row * hidden;
    float largest = 0;
    double squares = 0;
    for (int at = 0; at < hidden; at += GROUP) {
        float part_max[GROUP / SUBGROUP], group_max = 0;
        for (int part = 0; part < GROUP / subgroup; part++) {
            vec values[GROUP / WIDTH];
            for (int i = 0; i < subgroup / WIDTH; i++) values[i] = load(x + at + part * subgroup + i * WIDTH);
            part_max[part] = float_from_bits(max_magnitude_bits(subgroup / WIDTH, values));
            group_max = max_or_nan(group_max, part_max[part]);
        }
        for (int part = 0; part < GROUP / subgroup; part++) { /* half a level, see round_group */
            double error = (part_max[part] + group_max / MULTIPLES) / (2 * levels) + 1e-30;
            squares += subgroup * error * error;
        }
        largest = max_or_nan(largest, group_max);
    }
    int is_normal = largest > 1e-20f && largest < 1e18f;
    const float margin = 1.001f; /* for the roundings in here */
    step->errors[row] = is_normal ? margin * (float)sqrt(squares) : INFINITY;
    step->errors[step->rows + row] = margin * hidden * FLT_EPSILON * largest * sqrtf(hidden);
}

/* Bounds the logits of a panel. */
static void bound_panel(const HeadStep *step, const Tile *tile, int worker) {
    int num_panels = num_head_panels(step->model), first_id = tile->panel * PANEL;
    const float *lengths = step->model->head_lengths + tile->panel;
    for (int r = 0; r < tile->end_row - tile->first_row; r++) {
        int row = tile->first_row + r;
        vec allowed[2]; /* -infinity for the other tokens */
        for (int v = 0; v < 2; v++) {
            int first = first_id + v * WIDTH;
            allowed[v] = select_lanes(allowed_tokens(step, row, counting_from(first), first), tile->acc[r][v],
                                      broadcast(-INFINITY));
        }
        float largest = reduce_max(max_of(allowed[0], allowed[1]));
        float error = step->errors[row] * lengths[0] + step->errors[step->rows + row] * lengths[num_panels];
        float *lower = step->lower + (int64_t)worker * step->rows + row;
        step->upper[(int64_t)tile->panel * step->rows + row] = largest + error;
        if (largest - error > *lower) *lower = largest - error;
    }
}

/* Scales the products of a panel to logits, and stores or compares them. */
static void keep_logits(const HeadStep *step, const Tile *tile, int worker) {
    const Model *model = step->model;
    float scale[BLOCK_ROWS];
    inverse_rms(step->space, model->hidden, model->eps, tile, scale);
    for (int r = 0; r < tile->end_row - tile->first_row; r++) {
        int row = tile->first_row + r;
        vec first = tile->acc[r][0] * scale[r], second = tile->acc[r][1] * scale[r];
        if (step->logits) {
            int64_t panel = (int64_t)row * num_head_panels(model) + tile->panel;
            unaligned_vec *out = (unaligned_vec *)(step->logits + panel * PANEL);
            out[0] = first, out[1] = second;
        } else {
            Best *best = step->best + (int64_t)worker * step->rows + row;
            keep_best(step, row, first, tile->panel * PANEL, best);
            keep_best(step, row, second, tile->panel * PANEL + WIDTH, best);
        }
    }
}

/* Multiplies a panel with the rows whose largest logit it may hold. */
static void multiply_candidates(const HeadStep *step, int panel, int worker) {
    Product product = head_product(step);
    product.rows = 1, product.integers = 0;
    for (int row = 0; row < step->rows; row++) {
        float lower = -INFINITY;
        for (int t = 0; t < step->num_threads; t++)
            lower = max_or_nan(lower, step->lower[(int64_t)t * step->rows + row]);
        if (step->upper[(int64_t)panel * step->rows + row] < lower) continue; /* not if it is NaN */
        Tile tile;
        product.x = step->space->normed + (int64_t)row * product.features;
        compute_tile(&product, panel, worker, &tile);
        tile.first_row = row, tile.end_row = row + 1;
        keep_logits(step, &tile, worker);
    }
}

static int head_items(const void *work, int op) {
    const HeadStep *step = work;
    if (op == HEAD_OPS) return -1;
    Product product = head_product(step);
    switch (op) {
        case PREPARE_HEAD: return step->rows;
        case ROUND_HEAD: return product.integers ? step->rows : 0;
        case BOUND_HEAD: return step->upper ? num_product_items(&product) : 0;
        default: return step->upper ? product.num_panels : num_product_items(&product);
    }
}

static void compute_head(const void *work, int op, int item, int worker) {
    const HeadStep *step = work;
    const Model *model = step->model;
    int hidden = model->hidden;
    Product product = head_product(step);
    Tile tile;
    switch (op) {
        case PREPARE_HEAD:
            for (int panel = 0; panel < hidden / PANEL; panel++) {
                const float *row = step->hidden + (int64_t)item * hidden;
                const unaligned_vec *x = (const unaligned_vec *)(row + panel * PANEL);
                prepare_norm(step->space, hidden, model->norm, item, panel, x[0], x[1]);
            }
            break;
        case ROUND_HEAD:
            round_inputs(&product, item);
            if (step->upper) bound_errors(step, item);
            break;
        case BOUND_HEAD:
            compute_tile(&product, item, worker, &tile);
            bound_panel(step, &tile, worker);
            break;
        default:
            if (step->upper) {
                multiply_candidates(step, item, worker);
                break;
            }
            compute_tile(&product, item, worker, &tile);
            keep_logits(step, &tile, worker);
    }
}

static const Program HEAD_PROGRAM = {head_items, compute_head};

/* Computes logits of (rows, H) hidden states; out is (rows, vocab rounded up to panels). */
EXPORT int smol_logits(Team *team, const Model *model, const float *hidden, int rows,
                       const Space *space, float *out) {
    if (!is_aligned(model->head.panels)) return MISALIGNED;
    HeadStep step = {.model = model, .hidden = hidden, .rows = rows, .space = space, .logits = out};
    return team_run(team, &HEAD_PROGRAM, &step);
}

/* Computes the most likely token of each row, ids (rows,): the first one in a tie, -1 if a logit is NaN
   or no token is allowed.

   allowed has one bit per token, (rows, whole panels), or is NULL; best is scratch space,
   (threads, rows), aligned like weights. bounds is scratch space, (panels + threads + 2, rows), or NULL; it
   needs model->head_lengths. */
EXPORT int smol_best(Team *team, const Model *model, const float *hidden, int rows,
                     const uint8_t *allowed, const Space *space, Best *best, float *bounds, int32_t *ids) {
    if (!is_aligned(model->head.panels) || !is_aligned(best)) return MISALIGNED;
    int num_threads = team_num_threads(team);
    for (int64_t i = 0; i < (int64_t)rows * num_threads; i++)
        best[i] = (Best){broadcast(-INFINITY), (ivec){} - 1, (ivec){}};
    HeadStep step = {.model = model,
                     .hidden = hidden,
                     .rows = rows,
                     .space = space,
                     .best = best,
                     .allowed = allowed,
                     .num_threads = num_threads};
    if (bounds) {
        step.upper = bounds;
        step.lower = bounds + (int64_t)num_head_panels(model) * rows;
        step.errors = step.lower + (int64_t)num_threads * rows;
        for (int64_t i = 0; i < (int64_t)num_threads * rows; i++) step.lower[i] = -INFINITY;
    }
    int status = team_run(team, &HEAD_PROGRAM, &step);
    if (status != OK) return status;
    for (int row = 0; row < rows; row++) {
        float top = -INFINITY;
        int is_nan = 0;
        ids[row] = -1;
        for (int t = 0; t < num_threads; t++) {
            const Best *found = best + (int64_t)t * rows + row;
            for (int i = 0; i < WIDTH; i++) {
                int is_first = found->value[i] == top && found->id[i] < ids[row];
                is_nan |= found->is_nan[i];
                if (found->id[i] >= 0 && (found->value[i] > top || is_first)) {
                    top = found->value[i];
                    ids[row] = found->id[i];
                }
            }
        }
        if (is_nan) ids[row] = -1;
    }
    return OK;
}
