// Large blocks that are kept for the next taker, as torch's caching allocator keeps device memory.
//
// malloc gives a block of 32 MiB or more back to the system at every free, so that each training step pays
// the first touch of its weight gradients again: 604 MB at E=96, H=1024, I=512, which costs more than
// computing them.
#pragma once

#include <cstdint>

namespace sigma::cpu {

// At least `bytes` of memory, aligned to and backed by huge pages where the system has them, contents
// undefined; nullptr where it has no memory left.  A free block of the same size, rounded up to 2 MiB, is
// taken before new memory.  Free and taken blocks together never exceed the most that was ever taken at once.
void* take_block(int64_t bytes);

// Keep a block of take_block(bytes) for the next taker.  Until then the system may have its pages when it
// runs short.
void give_block(void* block, int64_t bytes);

// Bytes in free blocks, and their return to the system.
int64_t free_block_bytes();
void release_free_blocks();

}  // namespace sigma::cpu
