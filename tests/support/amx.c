/* AMX in software: the tile instructions of unchanged machine code, on a processor without them.

   Such a processor answers a tile instruction with SIGILL. The handler here decodes the instruction,
   does to the thread's tiles and to memory what the manual says, and goes on behind it. Any other
   illegal instruction goes to whoever had the signal before. What a real unit would refuse, with #UD
   or #GP, is noted as a fault and skipped, so that a test can tell of it.

   The tile state belongs to the thread. Only a pointer to it is thread-local, in the static block of
   the loader, which a signal handler may read; the state itself comes from mmap and stays in a list.
*/
#define _GNU_SOURCE
#include <errno.h>
#include <immintrin.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, LANES = ROW_BYTES / 4, KEPT_FAULTS = 64 };

enum kind {
    LDTILECFG,
    STTILECFG,
    TILERELEASE,
    TILEZERO,
    TILELOADD,
    TILELOADDT1,
    TILESTORED,
    TDPBF16PS,
    TDPFP16PS,
    KINDS
};

typedef union {
    uint8_t bytes[ROWS][ROW_BYTES];
    uint32_t pairs[ROWS][LANES];
    float numbers[ROWS][LANES];
} tile;

/* The operand of ldtilecfg. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} config;

typedef struct state {
    tile tiles[TILES];
    config config;
    struct state *next;
} state;

typedef struct {
    enum kind kind;
    const char *reason;
} fault;

static __thread state *own __attribute__((tls_model("initial-exec")));
static _Atomic(state *) states;
static atomic_long counts[KINDS];
static fault faults[KEPT_FAULTS];
static atomic_long fault_count;
static struct sigaction before;

/* Arithmetic ------------------------------------------------------------------------------------ */

static float bits(uint32_t word)
{
    float number;
    memcpy(&number, &word, sizeof number);
    return number;
}

/* The lower and the upper half of a pair. A float16 that is denormal counts, a bfloat16 does not:
   the first becomes a normal float32, the second a denormal one. */
static float low(uint32_t pair, int float16)
{
    return float16 ? _cvtsh_ss(pair & 0xffff) : bits(pair << 16);
}

static float high(uint32_t pair, int float16)
{
    return float16 ? _cvtsh_ss(pair >> 16) : bits(pair & 0xffff0000);
}

/* c += a b, where row k of b holds of each column the pair of numbers 2k and 2k + 1. Each output
   has two sums that begin at zero, of the lower and of the upper halves, made by fused
   multiply-adds in the order of k; c receives the sum of the two. A function that the compiler
   cannot look through, since it does not know that its caller sets the mode of rounding. */
__attribute__((noipa, noinline)) static void
multiply(tile *c, const tile *a, const tile *b, int rows, int depth, int float16)
{
    float lows[ROWS][LANES], highs[ROWS][LANES];
    for (int k = 0; k < depth; k++)
        for (int n = 0; n < LANES; n++) {
            lows[k][n] = low(b->pairs[k][n], float16);
            highs[k][n] = high(b->pairs[k][n], float16);
        }
    for (int m = 0; m < rows; m++) {
        float low_sums[LANES] = {0}, high_sums[LANES] = {0};
        for (int k = 0; k < depth; k++) {
            float left = low(a->pairs[m][k], float16), right = high(a->pairs[m][k], float16);
            for (int n = 0; n < LANES; n++) {
                low_sums[n] = __builtin_fmaf(left, lows[k][n], low_sums[n]);
                high_sums[n] = __builtin_fmaf(right, highs[k][n], high_sums[n]);
            }
        }
        for (int n = 0; n < LANES; n++)
            c->numbers[m][n] += low_sums[n] + high_sums[n];
    }
}

/* The product of three tiles with the unit's own rounding: to nearest, denormals are zero, coming
   and going, and no exception is raised or noted. */
static void product(tile *c, const tile *a, const tile *b, int rows, int depth, int float16)
{
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(_MM_MASK_MASK | _MM_ROUND_NEAREST | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    multiply(c, a, b, rows, depth, float16);
    _mm_setcsr(mode);
}

/* Instructions ---------------------------------------------------------------------------------- */

static void refuse(enum kind kind, const char *reason)
{
    long place = atomic_fetch_add(&fault_count, 1);
    if (place < KEPT_FAULTS)
        faults[place] = (fault){kind, reason};
}

static state *tiles_of_this_thread(void)
{
    if (own)
        return own;
    state *made = mmap(NULL, sizeof *made, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED)
        __builtin_trap();
    made->next = atomic_load(&states);
    while (!atomic_compare_exchange_weak(&states, &made->next, made))
        ;
    return own = made;
}

/* Why a configuration is refused, or NULL. */
static const char *wrong(const config *new)
{
    if (new->palette > 1)
        return "the palette is neither 0 nor 1";
    if (new->palette == 0)
        return NULL;
    if (new->start_row != 0)
        return "start_row is not 0, which is for interrupted instructions only";
    for (int i = 0; i < 14; i++)
        if (new->reserved[i])
            return "a reserved byte is not 0";
    for (int i = 0; i < 16; i++) {
        if (i >= TILES && (new->row_bytes[i] || new->rows[i]))
            return "a tile above 7 is configured";
        if (new->row_bytes[i] > ROW_BYTES || new->rows[i] > ROWS)
            return "a tile has more than 16 rows or 64 bytes in a row";
        if (!new->row_bytes[i] != !new->rows[i])
            return "a tile has rows without bytes or bytes without rows";
    }
    return NULL;
}

static void configure(state *to, const void *address)
{
    config new;
    memcpy(&new, address, sizeof new);
    const char *reason = wrong(&new);
    if (reason) {
        refuse(LDTILECFG, reason);
        return;
    }
    if (new.palette == 0)
        memset(&new, 0, sizeof new);
    to->config = new;
    memset(to->tiles, 0, sizeof to->tiles);
}

/* Whether a thread may use a tile; a fault is noted where not. */
static int usable(const state *of, enum kind kind, unsigned number)
{
    const char *reason = NULL;
    if (of->config.palette == 0)
        reason = "no tiles are configured on this thread";
    else if (number >= TILES)
        reason = "there is no such tile";
    else if (of->config.rows[number] == 0)
        reason = "the tile is not configured";
    else if (of->config.row_bytes[number] % 4 && kind != TILEZERO)
        reason = "the tile's rows are no multiple of 4 bytes";
    if (reason)
        refuse(kind, reason);
    return !reason;
}

static void load(state *to, enum kind kind, unsigned number, const uint8_t *from, int64_t stride)
{
    if (!usable(to, kind, number))
        return;
    tile *into = &to->tiles[number];
    memset(into, 0, sizeof *into);
    for (int row = 0; row < to->config.rows[number]; row++)
        memcpy(into->bytes[row], from + row * stride, to->config.row_bytes[number]);
}

static void store(const state *from, unsigned number, uint8_t *to, int64_t stride)
{
    if (!usable(from, TILESTORED, number))
        return;
    for (int row = 0; row < from->config.rows[number]; row++)
        memcpy(to + row * stride, from->tiles[number].bytes[row], from->config.row_bytes[number]);
}

static void zero(state *of, unsigned number)
{
    if (usable(of, TILEZERO, number))
        memset(&of->tiles[number], 0, sizeof(tile));
}

static void dot(state *of, enum kind kind, unsigned c, unsigned a, unsigned b)
{
    if (!usable(of, kind, c) || !usable(of, kind, a) || !usable(of, kind, b))
        return;
    const config *shape = &of->config;
    const char *reason = NULL;
    if (a == b || a == c || b == c)
        reason = "the three tiles are not different ones";
    else if (shape->rows[c] != shape->rows[a])
        reason = "the first factor has other rows than the sum";
    else if (shape->row_bytes[c] != shape->row_bytes[b])
        reason = "the second factor has other columns than the sum";
    else if (shape->row_bytes[a] != 4 * shape->rows[b])
        reason = "the factors disagree about the pairs between them";
    if (reason) {
        refuse(kind, reason);
        return;
    }
    tile *sum = &of->tiles[c];
    product(sum, &of->tiles[a], &of->tiles[b], shape->rows[c], shape->rows[b], kind == TDPFP16PS);
    for (int row = 0; row < ROWS; row++) {
        int used = row < shape->rows[c] ? shape->row_bytes[c] : 0;
        memset(sum->bytes[row] + used, 0, ROW_BYTES - used);
    }
}

/* Decoding -------------------------------------------------------------------------------------- */

static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};

/* A decoded instruction; `address` and `stride` only where it has an operand in memory. */
typedef struct {
    enum kind kind;
    unsigned length, reg, rm, third;
    uint8_t *address;
    int64_t stride;
} instruction;

enum prefix { NONE, P66, PF3, PF2 };

/* Which instruction an opcode with its prefix and its operands' form is; KINDS: none of ours. */
static enum kind kind_of(uint8_t opcode, enum prefix prefix, int memory, unsigned reg, unsigned rm)
{
    if (opcode == 0x49 && memory && reg == 0)
        return prefix == NONE ? LDTILECFG : prefix == P66 ? STTILECFG : KINDS;
    if (opcode == 0x49 && !memory && prefix == NONE && reg == 0 && rm == 0)
        return TILERELEASE;
    if (opcode == 0x49 && !memory && prefix == PF2 && rm == 0)
        return TILEZERO;
    if (opcode == 0x4b && memory)
        return prefix == PF2   ? TILELOADD
               : prefix == P66 ? TILELOADDT1
               : prefix == PF3 ? TILESTORED
                               : KINDS;
    if (opcode == 0x5c && !memory)
        return prefix == PF3 ? TDPBF16PS : prefix == PF2 ? TDPFP16PS : KINDS;
    return KINDS;
}

/* Decode `[base + index * scale + displacement]`: the address is of base and displacement, with
   the index where it is not a tile's stride. Returns 0 for a form that the instruction forbids. */
static int decode_memory(instruction *found, const uint8_t *code, const greg_t *values)
{
    const unsigned rex_x = !(code[1] & 0x40) << 3, rex_b = !(code[1] & 0x20) << 3;
    const unsigned mod = code[4] >> 6, rm = code[4] & 7;
    const int by_rows = found->kind != LDTILECFG && found->kind != STTILECFG;
    const uint8_t *next = code + 5;
    uint64_t address = 0;
    found->stride = 0;
    int absolute = 0, relative = 0;
    if (rm == 4) {
        const uint8_t sib = *next++;
        const unsigned index = (sib >> 3 & 7) | rex_x, base = sib & 7;
        if (index != 4)
            found->stride = (uint64_t)values[REGISTERS[index]] << (sib >> 6);
        absolute = base == 5 && mod == 0;
        if (!absolute)
            address = values[REGISTERS[base | rex_b]];
    } else if (by_rows) {
        return 0;
    } else if (rm == 5 && mod == 0) {
        relative = 1;
    } else {
        address = values[REGISTERS[rm | rex_b]];
    }
    if (mod == 1) {
        address += (int8_t)*next++;
    } else if (mod == 2 || absolute || relative) {
        int32_t displacement;
        memcpy(&displacement, next, sizeof displacement);
        address += displacement;
        next += sizeof displacement;
    }
    if (relative)
        address += (uint64_t)next;
    if (!by_rows)
        address += found->stride;
    found->address = (uint8_t *)address;
    found->length = next - code;
    return 1;
}

/* Decode a three-byte VEX instruction of the map 0F 38 with W = 0 and L = 0. Returns 0 for others. */
static int decode(instruction *found, const uint8_t *code, const greg_t *values)
{
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0)
        return 0;
    const int memory = code[4] >> 6 != 3;
    found->reg = (code[4] >> 3 & 7) | !(code[1] & 0x80) << 3;
    found->rm = (code[4] & 7) | !(code[1] & 0x20) << 3;
    found->third = ~code[2] >> 3 & 15;
    found->kind = kind_of(code[3], code[2] & 3, memory, found->reg, found->rm);
    if (found->kind == KINDS)
        return 0;
    if (found->kind != TDPBF16PS && found->kind != TDPFP16PS && found->third != 0)
        return 0;
    found->length = 5;
    return !memory || decode_memory(found, code, values);
}

static void execute(const instruction *it)
{
    state *tiles = tiles_of_this_thread();
    atomic_fetch_add_explicit(&counts[it->kind], 1, memory_order_relaxed);
    switch (it->kind) {
    case LDTILECFG:
        configure(tiles, it->address);
        break;
    case STTILECFG:
        memcpy(it->address, &tiles->config, sizeof tiles->config);
        break;
    case TILERELEASE:
        memset(tiles, 0, offsetof(state, next));
        break;
    case TILEZERO:
        zero(tiles, it->reg);
        break;
    case TILELOADD:
    case TILELOADDT1:
        load(tiles, it->kind, it->reg, it->address, it->stride);
        break;
    case TILESTORED:
        store(tiles, it->reg, it->address, it->stride);
        break;
    default:
        dot(tiles, it->kind, it->reg, it->rm, it->third);
    }
}

/* Executes the tile instruction at fault and those that follow on it without another between: a
   signal costs far more than the work of an instruction. */
static void on_illegal(int number, siginfo_t *info, void *context)
{
    const int error = errno;
    greg_t *values = ((ucontext_t *)context)->uc_mcontext.gregs;
    instruction found = {0};
    if (decode(&found, (const uint8_t *)values[REG_RIP], values)) {
        do {
            execute(&found);
            values[REG_RIP] += found.length;
        } while (decode(&found, (const uint8_t *)values[REG_RIP], values));
    } else if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
        signal(number, SIG_DFL); /* the instruction runs again and ends the process */
    } else {
        before.sa_handler(number);
    }
    errno = error;
}

/* For the tests --------------------------------------------------------------------------------- */

int amx_install(void)
{
    struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    return sigaction(SIGILL, &action, &before);
}

int amx_remove(void)
{
    return sigaction(SIGILL, &before, NULL);
}

long amx_count(int kind)
{
    return atomic_load(&counts[kind]);
}

long amx_faults(void)
{
    return atomic_load(&fault_count);
}

int amx_fault_kind(int place)
{
    return faults[place].kind;
}

const char *amx_fault_reason(int place)
{
    return faults[place].reason;
}

/* How many threads have tiles configured now. */
int amx_configured(void)
{
    int found = 0;
    for (const state *each = atomic_load(&states); each; each = each->next)
        found += each->config.palette != 0;
    return found;
}

/* Forget counts, faults, and the tiles of every thread; no thread may be executing any. */
void amx_reset(void)
{
    for (state *each = atomic_load(&states); each; each = each->next)
        memset(each, 0, offsetof(state, next));
    for (int kind = 0; kind < KINDS; kind++)
        atomic_store(&counts[kind], 0);
    atomic_store(&fault_count, 0);
}

/* c += a b of whole tiles, 16 rows of 64 bytes, called as a function. */
void amx_product(tile *c, const tile *a, const tile *b, int float16)
{
    product(c, a, b, ROWS, ROWS, float16);
}
