// ticker OUT MEGABYTES [touch=N] [dirty=N] [set=N]: fills memory, then every 10 ms appends "ticker tick K REALTIME_NS" to OUT.
//   touch=N  each tick reads N pages of memory, spread at random
//   dirty=N  each tick changes N pages, one after another
//   set=N    on SIGUSR2 reads the same N scattered pages in the same order, then appends "ticker touched N REALTIME_NS"
// On SIGUSR1 it appends "ticker hash H REALTIME_NS", H over all memory. Ends by itself after ten minutes.
#include "memory.h"

static size_t option(int count, char **words, const char *name) {
  size_t length = strlen(name);
  for (int i = 3; i < count; i++)
    if (!strncmp(words[i], name, length) && words[i][length] == '=') return strtoull(words[i] + length + 1, 0, 10);
  return 0;
}

int main(int count, char **words) {
  if (count < 3) return 2;
  size_t pages = strtoull(words[2], 0, 10) * 256;
  size_t touch = option(count, words, "touch"), dirty = option(count, words, "dirty"), set = option(count, words, "set");
  start_program(words[1]);
  unsigned char *memory = map_memory(pages, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  fill_memory(memory, pages, 1);
  volatile uint64_t sum = 0;
  size_t next = 0;
  for (uint64_t tick = 0; tick < LIFETIME_TICKS; tick++) {
    for (size_t i = 0; i < touch; i++) sum += memory[scramble(tick * 65537 + i) % pages * PAGE + 64];
    for (size_t i = 0; i < dirty; i++, next = (next + 1) % pages) memcpy(memory + next * PAGE, &tick, 8);
    say("ticker", "tick", tick);
    if (hash_wanted) {
      hash_wanted = 0;
      say("ticker", "hash", hash_memory(memory, pages));
    }
    if (touch_wanted) {
      touch_wanted = 0;
      for (size_t i = 0; i < set; i++) sum += memory[scramble(i) % pages * PAGE + 64];
      say("ticker", "touched", set);
    }
    usleep(10000);
  }
}
