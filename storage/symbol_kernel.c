/* The models of storage/symbol_coding.py and storage/mixing.py as compiled code, decision for decision and bit for bit:
 * the map of what is not the commonest code, then sides and distances, each decision under a chance that counts in
 * several contexts give, mixed in the logistic domain. Whole numbers only, so every compiler gives the same.
 *
 * A decoder takes decisions from a stream of asymmetric numeral systems as the library `constriction` writes it: a state
 * of 64 bits that is filled up by words of 32, chances of 24 bits. A writer gets the chances and decisions in their
 * order, for the library to encode.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

const int32_t fleetpress_symbols_version = 1; /* of the function's arguments; symbol_kernel.py compares it */

enum {
    TABLES = 3,             /* of contexts, at most */
    LARGEST_BLOCK = 2048,   /* decisions that are coded before their model learns from them */
    MAP_BLOCK = 64,         /* of a row of the map, */
    FIRST_BLOCK = 16,       /* of its first row, and of everything that has no rows; blocks grow from there */
    STEPS = 14,             /* distances that are told step by step; larger ones as a byte */
    ABOVE = 64,             /* contexts of the distances in the row before */
    NEIGHBOURS = 2 * 3 * 3, /* contexts of what lies around an entry in the two rows before */
};
static const int64_t ONE = 1 << 16; /* chances are whole numbers of 1/65536 */
static const int64_t LARGEST = 12 * 256 - 1;
static const int64_t WEIGHT = 1 << 16, FIRST_SUM = 85000, RATE = 20000 * 256;
static const int64_t INERTIA = (int64_t)150 * 65536 * 65536;
enum { NO_MEMORY = -1, NO_BYTE = -2 };

/* What is coded, and where from or to. `bits` of a writer are appended; a decoder has none. */
typedef struct {
    const int64_t *log_odds, *logistic; /* by chance; by log odds from -LARGEST on */
    uint64_t state;
    const uint32_t *words;
    int64_t left; /* words that were not read: from the last one to the first */
    uint16_t *chances;
    uint8_t *bits;
    int64_t decisions;
} Stream;

/* One kind of decision in several tables of contexts. */
typedef struct {
    int tables;
    int64_t starts[TABLES], weights[TABLES], curvature[TABLES];
    int64_t prior, *seen, *ones;
} Model;

static int new_model(Model *model, const Stream *stream, int tables, const int64_t *sizes, int64_t prior, int64_t strength) {
    int64_t count = 0;
    model->tables = tables;
    for (int table = 0; table < tables; table++) {
        model->starts[table] = count;
        model->weights[table] = tables > 1 ? FIRST_SUM / tables : WEIGHT;
        model->curvature[table] = INERTIA;
        count += sizes[table];
    }
    model->prior = stream->log_odds[prior];
    model->seen = malloc((size_t)count * 2 * sizeof(int64_t));
    if (!model->seen) return 0;
    model->ones = model->seen + count;
    for (int64_t place = 0; place < count; place++) {
        model->seen[place] = strength;
        model->ones[place] = strength * prior;
    }
    return 1;
}

static int64_t floor_divided(int64_t number, int64_t by) { /* as Python does it; `by` is positive */
    int64_t quotient = number / by;
    return quotient - (number % by < 0);
}

/* The next decision of a stream that is read. */
static int decoded(Stream *stream, int64_t chance) {
    const uint64_t whole = 1 << 24, zeros = 1 + (((uint64_t)(ONE - chance) * (whole - 2)) >> 16);
    const uint64_t at = stream->state & (whole - 1);
    const int bit = at >= zeros;
    const uint64_t start = bit ? zeros : 0, share = bit ? whole - zeros : zeros;
    stream->state = (stream->state >> 24) * share + (at - start);
    if (stream->state >> 32 == 0 && stream->left)
        stream->state = stream->state << 32 | stream->words[--stream->left];
    return bit;
}

/* Code `count` decisions at once and learn from them: `contexts` holds them table by table, LARGEST_BLOCK apart. */
static void code(Stream *stream, Model *model, int64_t count, const int32_t *contexts, uint8_t *bits) {
    int64_t evidence[TABLES][LARGEST_BLOCK], chances[LARGEST_BLOCK], gradient, bend;
    const int tables = model->tables;
    if (!count) return;
    for (int64_t index = 0; index < count; index++) {
        int64_t sum = 0;
        for (int table = 0; table < tables; table++) {
            const int64_t place = model->starts[table] + contexts[table * LARGEST_BLOCK + index];
            const int64_t found = stream->log_odds[model->ones[place] / model->seen[place]] - model->prior;
            evidence[table][index] = found;
            sum += found * model->weights[table];
        }
        int64_t mixed = model->prior + (sum >> 16);
        mixed = mixed < -LARGEST ? -LARGEST : mixed > LARGEST ? LARGEST : mixed;
        chances[index] = stream->logistic[mixed + LARGEST];
    }
    if (stream->bits) {
        for (int64_t index = 0; index < count; index++) {
            stream->chances[stream->decisions] = (uint16_t)chances[index];
            stream->bits[stream->decisions++] = bits[index];
        }
    } else {
        for (int64_t index = 0; index < count; index++) bits[index] = (uint8_t)decoded(stream, chances[index]);
    }
    for (int table = 0; table < tables; table++) {
        gradient = bend = 0;
        for (int64_t index = 0; index < count; index++) {
            const int64_t told = evidence[table][index], chance = chances[index];
            bend += ((chance * (ONE - chance)) >> 16) * told * told;
            gradient += (bits[index] * ONE - chance) * told;
        }
        model->curvature[table] += bend;
        model->weights[table] += floor_divided(gradient * RATE, model->curvature[table]);
        for (int64_t index = 0; index < count; index++) {
            const int64_t place = model->starts[table] + contexts[table * LARGEST_BLOCK + index];
            model->seen[place]++;
            model->ones[place] += bits[index] * ONE;
        }
    }
}

static int64_t grown(int64_t size, int64_t most) { return 2 * size < most ? 2 * size : most; }

static int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

/* Which entries are not the commonest code: 0 or 1 in `map` [rows, columns], which a writer fills beforehand. */
static int code_map(Stream *stream, int64_t rows, int64_t columns, int64_t others, int alike, uint8_t *map) {
    int32_t contexts[TABLES * LARGEST_BLOCK];
    const int64_t sizes[TABLES] = {alike ? 1 : columns, rows, NEIGHBOURS};
    Model chances;
    if (!new_model(&chances, stream, alike ? 1 : 3, sizes, others, 4)) return 0;
    if (alike) {
        memset(contexts, 0, sizeof contexts);
        for (int64_t start = 0, size = FIRST_BLOCK; start < rows * columns; start += size, size = grown(size, LARGEST_BLOCK))
            code(stream, &chances, least(size, rows * columns - start), contexts, map + start);
        free(chances.seen);
        return 1;
    }
    uint8_t *known = calloc((size_t)(rows + 2) * (size_t)(columns + 4), 1); /* nothing before and beside them */
    for (int64_t row = 0; known && row < rows; row++) {
        const uint8_t *last = known + row * (columns + 4), *one = last + columns + 4;
        uint8_t *now = known + (row + 2) * (columns + 4) + 2, *mine = map + row * columns;
        int64_t size = row ? MAP_BLOCK : FIRST_BLOCK;
        for (int64_t start = 0; start < columns; start += size, size = grown(size, MAP_BLOCK)) {
            const int64_t count = least(size, columns - start);
            for (int64_t index = 0; index < count; index++) {
                const int64_t at = start + index;
                contexts[index] = (int32_t)at;
                contexts[LARGEST_BLOCK + index] = (int32_t)row;
                contexts[2 * LARGEST_BLOCK + index] = (int32_t)(
                    one[at + 2] + 2 * least(one[at + 1] + one[at + 3], 2) + 6 * least(last[at + 2] + one[at] + one[at + 4], 2)
                );
            }
            code(stream, &chances, count, contexts, mine + start);
            memcpy(now + start, mine + start, (size_t)count);
        }
    }
    free(chances.seen);
    free(known);
    return known != NULL;
}

/* What the decisions about the others need. */
typedef struct {
    Model signs, far, steps[STEPS];
    int step_count, has_far, alike;
    int64_t rows, columns;
    uint8_t *distances; /* [rows + 1, columns + 2]; a row of nothing before the first */
} Others;

/* Numbers below 256 in `rest`, bit by bit from the highest, each in the context of those before it. */
static void code_bytes(Stream *stream, Model *far, int64_t count, int32_t *rest) {
    int32_t nodes[LARGEST_BLOCK];
    uint8_t bits[LARGEST_BLOCK];
    for (int64_t index = 0; index < count; index++) nodes[index] = 1;
    for (int place = 7; place >= 0; place--) {
        for (int64_t index = 0; index < count; index++) bits[index] = (uint8_t)(rest[index] >> place & 1);
        code(stream, far, count, nodes, bits);
        for (int64_t index = 0; index < count; index++) nodes[index] = 2 * nodes[index] + bits[index];
    }
    for (int64_t index = 0; index < count; index++) rest[index] = nodes[index] - 256;
}

/* How far a block of codes lies from the commonest one; `offsets` are read by a writer and written otherwise. */
static void code_block(Stream *stream, Others *others, int64_t count, const int32_t *rows, const int32_t *columns, int32_t *offsets) {
    int32_t contexts[TABLES * LARGEST_BLOCK], chosen[TABLES * LARGEST_BLOCK], rest[LARGEST_BLOCK];
    int32_t distances[LARGEST_BLOCK], going[LARGEST_BLOCK];
    uint8_t signs[LARGEST_BLOCK], bits[LARGEST_BLOCK];
    const int tables = others->alike ? 1 : TABLES;
    for (int64_t index = 0; index < count; index++) {
        contexts[index] = 0;
        contexts[LARGEST_BLOCK + index] = rows[index];
        contexts[2 * LARGEST_BLOCK + index] = columns[index];
        signs[index] = stream->bits && offsets[index] > 0;
    }
    code(stream, &others->signs, count, contexts, signs);
    for (int64_t index = 0; index < count; index++) {
        const uint8_t *before = others->distances + rows[index] * (others->columns + 2) + columns[index];
        const int32_t above = 2 * before[1] + before[0] + before[2];
        if (!others->alike) {
            contexts[index] = columns[index];
            contexts[LARGEST_BLOCK + index] = rows[index];
            contexts[2 * LARGEST_BLOCK + index] = (int32_t)least(above, ABOVE - 1);
        }
        distances[index] = 1;
        going[index] = (int32_t)index;
    }
    int64_t left = count;
    for (int step = 0; step < others->step_count; step++) {
        int64_t more = 0;
        for (int64_t index = 0; index < left; index++) {
            for (int table = 0; table < tables; table++)
                chosen[table * LARGEST_BLOCK + index] = contexts[table * LARGEST_BLOCK + going[index]];
            bits[index] = stream->bits && abs(offsets[going[index]]) > step + 1;
        }
        code(stream, &others->steps[step], left, chosen, bits);
        for (int64_t index = 0; index < left; index++) {
            if (!bits[index]) continue;
            distances[going[index]]++;
            going[more++] = going[index];
        }
        left = more;
    }
    if (others->has_far && left) {
        for (int64_t index = 0; index < left; index++)
            rest[index] = stream->bits ? abs(offsets[going[index]]) - STEPS : 0;
        code_bytes(stream, &others->far, left, rest);
        for (int64_t index = 0; index < left; index++) distances[going[index]] += rest[index];
    }
    for (int64_t index = 0; index < count; index++) {
        const int32_t distance = distances[index];
        others->distances[(rows[index] + 1) * (others->columns + 2) + columns[index] + 1] = (uint8_t)least(distance, 255);
        offsets[index] = signs[index] ? distance : -distance;
    }
}

static int64_t code_others(Stream *stream, Others *others, int64_t commonest, const uint8_t *map, uint8_t *codes) {
    int32_t rows[LARGEST_BLOCK], columns[LARGEST_BLOCK], offsets[LARGEST_BLOCK];
    int64_t size = FIRST_BLOCK, count = 0, ends = 0;
    const int64_t all = others->rows * others->columns;
    for (int64_t at = 0; at <= all; at++) {
        if (at < all && map[at]) {
            rows[count] = (int32_t)(at / others->columns);
            columns[count] = (int32_t)(at % others->columns);
            offsets[count++] = (int32_t)codes[at] - (int32_t)commonest;
        }
        if (count && (count == size || at == all)) {
            code_block(stream, others, count, rows, columns, offsets);
            for (int64_t index = 0; index < count; index++) {
                const int64_t value = commonest + offsets[index];
                if (value < 0 || value > 255) ends = NO_BYTE;
                codes[rows[index] * others->columns + columns[index]] = (uint8_t)value;
            }
            size = grown(size, LARGEST_BLOCK);
            count = 0;
        }
    }
    return ends;
}

/* Code `codes` [rows, columns], which lie at most `furthest` from the commonest one. With `bits` they are written: each
 * decision and its chance, for which there must be room. Without, they are read from the `left` words of a stream, whose
 * state and place are given back. Returns the number of decisions that were written, NO_MEMORY, or NO_BYTE for codes
 * beyond 255.
 */
int64_t fleetpress_code_symbols(
    const int64_t *log_odds, const int64_t *logistic, uint64_t *state, const uint32_t *words, int64_t *left, int64_t rows,
    int64_t columns, int64_t commonest, int64_t furthest, int64_t others_share, int64_t above_share, int alike, uint8_t *codes,
    uint16_t *chances, uint8_t *bits
) {
    const int64_t all = rows * columns;
    Stream stream = {log_odds, logistic, *state, words, *left, chances, bits, 0};
    Others *others = calloc(1, sizeof(Others));
    uint8_t *map = malloc((size_t)all);
    int64_t ends = NO_MEMORY;
    if (others && map) {
        const int64_t sign_sizes[TABLES] = {1, rows, columns}, far_sizes[1] = {256};
        const int64_t step_sizes[TABLES] = {alike ? 1 : columns, rows, ABOVE};
        const int tables = alike ? 1 : TABLES;
        others->rows = rows, others->columns = columns, others->alike = alike, others->has_far = furthest > STEPS;
        others->step_count = (int)least(furthest, STEPS) - 1;
        others->distances = calloc((size_t)(rows + 1) * (size_t)(columns + 2), 1);
        int made = others->distances && new_model(&others->signs, &stream, tables, sign_sizes, above_share * 256 + 128, 8) &&
                   new_model(&others->far, &stream, 1, far_sizes, ONE / 2, 1);
        for (int step = 0; made && step < others->step_count; step++)
            made = new_model(&others->steps[step], &stream, tables, step_sizes, ONE / 2, 2);
        for (int64_t at = 0; at < all; at++) map[at] = bits && codes[at] != commonest;
        if (made && code_map(&stream, rows, columns, others_share, alike, map)) {
            if (!bits) memset(codes, (int)commonest, (size_t)all);
            ends = code_others(&stream, others, commonest, map, codes);
        }
        free(others->distances), free(others->signs.seen), free(others->far.seen);
        for (int step = 0; step < STEPS; step++) free(others->steps[step].seen);
    }
    free(map), free(others);
    *state = stream.state, *left = stream.left;
    return ends < 0 ? ends : stream.decisions;
}
