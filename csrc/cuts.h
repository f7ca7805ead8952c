// The sizes at which a kernel goes another way, as measured (benchmarks/notes.md). The blocks are also
// the order in which sums are taken: they depend on shapes alone, never on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace normkit {

// Sums along rows.
constexpr int64_t kBlock = 2048;   // elements whose sums are kept in T
constexpr int64_t kSome = 256;     // elements whose mean stands for a block's at first
constexpr int64_t kShort = 256;    // bytes of T that are summed in one slot
constexpr int64_t kSeveral = 16;   // short pools whose statistics are finished together
constexpr int64_t kChunkRows = 32;  // rows of a chunk whose sums for weight and bias are kept in T
constexpr int64_t kChunks = 256;    // chunks at most

// Sums down columns.
constexpr int64_t kShortRun = 16;         // positions below which batch norm goes down columns
constexpr int64_t kTile = 1024;           // columns of a tile
constexpr int64_t kTileRows = 256;        // rows of a block of a tile at most
constexpr int64_t kTileElements = 131072; // elements of such a block; of a tile, if rows have affines
constexpr int64_t kSomeRows = 8;          // rows whose mean stands for a block's at first
constexpr int64_t kAhead = 8;             // rows between those that are read and those fetched

// Threads: a call of fewer elements runs on one.
constexpr int64_t kGrain = 16384;

// Outputs, in bytes.
constexpr size_t kStreamFrom = size_t{1} << 23;  // written past the caches
constexpr size_t kHugeFrom = size_t{1} << 25;    // in huge pages: below, malloc keeps what was freed

}  // namespace normkit
