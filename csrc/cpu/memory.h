// First touch of a large fresh block.
#pragma once

#include <cstdint>

namespace sigma::cpu {

// Ask for huge pages under [p, p + bytes): touching 604 MB for the first time in 4 KiB pages costs more than
// computing what goes into it.  A hint: false where the kernel declines, and nothing depends on it.
bool advise_huge_pages(void* p, int64_t bytes);

}  // namespace sigma::cpu
