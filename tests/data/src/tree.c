// tree OUT MEGABYTES: three processes that each append "ROLE tick K REALTIME_NS" to OUT every 10 ms.
//   parent  half of the memory is private, a quarter is shared anonymous; feeds the pipe and the socket pair
//   cow     a child that shares the private memory copy-on-write and has changed every eighth page of it
//   shared  a child with the shared anonymous memory, and a memfd of the last quarter; reads the pipe and the sockets
// On SIGUSR1 a role appends "ROLE hash H REALTIME_NS" over its memory. "shared" also says "pipe" or "socket" for what came.
#include "memory.h"

static void tick(const char *role, uint64_t number, const unsigned char *one, size_t one_pages, const unsigned char *two,
                 size_t two_pages) {
  say(role, "tick", number);
  if (hash_wanted) {
    hash_wanted = 0;
    say(role, "hash", hash_memory(one, one_pages) ^ (two ? hash_memory(two, two_pages) : 0));
  }
  usleep(10000);
}

int main(int count, char **words) {
  if (count < 3) return 2;
  size_t all = strtoull(words[2], 0, 10) * 256, own = all / 2, shared = all / 4, in_file = all / 4;
  int feed[2], pair[2];
  if (pipe2(feed, O_NONBLOCK) || socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair)) return 3;
  start_program(words[1]);
  unsigned char *private_memory = map_memory(own, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  unsigned char *shared_memory = map_memory(shared, MAP_SHARED | MAP_ANONYMOUS, -1);
  fill_memory(private_memory, own, 1);
  fill_memory(shared_memory, shared, 2);

  if (fork() == 0) {
    munmap(shared_memory, shared * PAGE);
    close(feed[0]), close(feed[1]), close(pair[0]), close(pair[1]);
    for (size_t page = 0; page < own; page += 8) fill_random(private_memory + page * PAGE, page);
    for (uint64_t k = 0; k < LIFETIME_TICKS; k++) tick("cow", k, private_memory, own, 0, 0);
    _exit(0);
  }
  if (fork() == 0) {
    munmap(private_memory, own * PAGE);
    close(feed[1]), close(pair[0]);
    int file = memfd_create("workload", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, in_file * PAGE)) _exit(6);
    unsigned char *file_memory = map_memory(in_file, MAP_SHARED, file);
    fill_memory(file_memory, in_file, 3);
    for (uint64_t k = 0; k < LIFETIME_TICKS; k++) {
      unsigned char byte;
      if (read(feed[0], &byte, 1) == 1 && k % 50 == 0) say("shared", "pipe", byte);
      if (read(pair[1], &byte, 1) == 1 && k % 50 == 1) say("shared", "socket", byte);
      memcpy(shared_memory + k % shared * PAGE, &k, 8);
      memcpy(file_memory + k % in_file * PAGE, &k, 8);
      tick("shared", k, shared_memory, shared, file_memory, in_file);
    }
    _exit(0);
  }
  close(feed[0]), close(pair[1]);
  for (uint64_t k = 0; k < LIFETIME_TICKS; k++) {
    unsigned char byte = k % 100 + 1;
    if (write(feed[1], &byte, 1) < 0 || write(pair[0], &byte, 1) < 0) { /* full is fine: the reader is slower */ }
    tick("parent", k, private_memory, own, shared_memory, shared);
  }
}
