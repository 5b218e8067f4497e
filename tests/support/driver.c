/* Runs one kernel on arrays from a file, and writes the arrays back: how kernels for another
 * processor are tested under an emulator. Every array lies flush against a page that no one may
 * touch, after it or before it.
 *
 * The file is a line of 64-bit words, then the bytes of the arrays:
 *     after, words, pointers, arrays
 *     the words of the argument block
 *     for each pointer: its place in the block, the array it points into, bytes from its start
 *     for each array: its bytes
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void KERNEL(void *arguments);

static void *checked(void *pointer, const char *what) {
    if (pointer == NULL || pointer == MAP_FAILED) {
        perror(what);
        exit(2);
    }
    return pointer;
}

static int64_t *read_words(FILE *file, int64_t count) {
    int64_t *words = checked(calloc(count + 1, 8), "memory");
    if (fread(words, 8, count, file) != (size_t)count) checked(NULL, "words");
    return words;
}

/* An array between two pages without access, flush against the second one or the first one. */
static char *place(int64_t bytes, int after) {
    int64_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    char *base = checked(mmap(NULL, inside + 2 * page, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "pages");
    if (mprotect(base, page, PROT_NONE) || mprotect(base + page + inside, page, PROT_NONE))
        checked(NULL, "guard pages");
    return base + page + (after ? inside - bytes : 0);
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    FILE *file = checked(fopen(arguments[1], "rb"), arguments[1]);
    int64_t *head = read_words(file, 4);
    int64_t *words = read_words(file, head[1]);
    int64_t *pointers = read_words(file, 3 * head[2]);
    int64_t *bytes = read_words(file, head[3]);
    char **arrays = checked(calloc(head[3] + 1, sizeof *arrays), "memory");
    for (int64_t i = 0; i < head[3]; i++) {
        arrays[i] = place(bytes[i], head[0]);
        if (fread(arrays[i], 1, bytes[i], file) != (size_t)bytes[i]) checked(NULL, "arrays");
    }
    fclose(file);
    for (int64_t i = 0; i < head[2]; i++) {
        int64_t *pointer = pointers + 3 * i;
        words[pointer[0]] = (int64_t)(arrays[pointer[1]] + pointer[2]);
    }
    char *block = place(8 * head[1], head[0]);
    memcpy(block, words, 8 * head[1]);
    KERNEL(block);
    file = checked(fopen(arguments[2], "wb"), arguments[2]);
    for (int64_t i = 0; i < head[3]; i++)
        if (fwrite(arrays[i], 1, bytes[i], file) != (size_t)bytes[i]) checked(NULL, "results");
    return fclose(file) ? 2 : 0;
}
