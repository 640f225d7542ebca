// Memory with known contents, and a way to see that it is still the same after a restore.
// The first 8 bytes of each page are free to change while the program runs; hash_memory leaves them out.
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, BLOCK_PAGES = 16, LIFETIME_TICKS = 60000 };

static uint64_t scramble(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

static void fill_random(unsigned char *page, uint64_t seed) {
  for (int i = 0; i < PAGE; i += 8) {
    uint64_t word = scramble(seed + i);
    memcpy(page + i, &word, 8);
  }
}

// Sentences of a small vocabulary: compresses about as well as logs or JSON.
static void fill_text(unsigned char *page, uint64_t seed) {
  static const char *words[] = {"session ", "request=", "GET /v2/", "checkpoint ", "status 200 ", "user-", "cache ",
                                "\"name\": ", "null, ", "restore ", "container ", "latency_ms=", "the ", "of ", "page ", "\n"};
  uint64_t state = seed;
  for (int at = 0; at < PAGE;) {
    state = scramble(state);
    char number[8];
    const char *word = words[state & 15];
    if ((state >> 8 & 7) == 0) {
      snprintf(number, sizeof number, "%03u ", (unsigned)(state >> 20) % 1000);
      word = number;
    }
    int length = strlen(word);
    if (length > PAGE - at) length = PAGE - at;
    memcpy(page + at, word, length);
    at += length;
  }
}

// In each 20 blocks of 64 KiB: 9 random, 7 text, 4 zero. zstd makes about half of it.
static void fill_memory(unsigned char *memory, size_t pages, uint64_t seed) {
  for (size_t page = 0; page < pages; page++) {
    unsigned kind = page / BLOCK_PAGES % 20;
    unsigned char *at = memory + page * PAGE;
    if (kind % 2 == 0 && kind < 18) fill_random(at, seed * 1000003 + page * PAGE);
    else if (kind < 14) fill_text(at, seed * 1000003 + page);
    else memset(at, 0, PAGE);  // touched, so it is dumped
  }
}

static uint64_t hash_memory(const unsigned char *memory, size_t pages) {
  uint64_t hash = 14695981039346656037ull;
  for (size_t page = 0; page < pages; page++)
    for (int i = 8; i < PAGE; i += 8) {
      uint64_t word;
      memcpy(&word, memory + page * PAGE + i, 8);
      hash = (hash ^ word) * 1099511628211ull;
    }
  return hash;
}

static unsigned char *map_memory(size_t pages, int flags, int fd) {
  unsigned char *memory = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (memory == MAP_FAILED) _exit(3);
  madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
  return memory;
}

static int out;
static volatile sig_atomic_t hash_wanted, touch_wanted;
static void on_signal(int number) { if (number == SIGUSR1) hash_wanted = 1; else touch_wanted = 1; }

// Appends "ROLE WHAT NUMBER REALTIME_NS" to the file of the program.
static void say(const char *role, const char *what, uint64_t number) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);  // CRIU puts the monotonic clock into a namespace of its own
  char line[128];
  int length = snprintf(line, sizeof line, "%s %s %llu %llu\n", role, what, (unsigned long long)number,
                        (unsigned long long)now.tv_sec * 1000000000ull + now.tv_nsec);
  if (write(out, line, length) != length) _exit(4);
}

static void start_program(const char *path) {
  out = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (out < 0) _exit(5);
  struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
  sigaction(SIGUSR1, &action, 0);
  sigaction(SIGUSR2, &action, 0);
}
