#include <map>
#include <memory>
#include <vector>

#include "cuda.h"

namespace emulator {
namespace {

constexpr int kWarps = 1024 / kLanes, kWarpsOfGroup = 4;
// Where the dynamic shared memory of a block starts in its address space: 128-byte aligned, as kernels ask for, and
// no more.
constexpr uint32_t kSharedStart = 1024 + 128;

using Tile = std::vector<uint16_t>;  // [rows or columns, 16 of k]

struct Product {
    float* d;
    int columns;
    const uint32_t* a;     // null: A is a tile
    uint32_t fragment[4];  // of A, when it was issued
    uint64_t a_tile, b;
    std::shared_ptr<const Tile> tiles[2];  // of A and B, when it was issued
    double (*value)(uint16_t);
    unsigned group;  // commits of the thread before it
};

struct Fragment {  // of A, as it was at the last fence
    const uint32_t* a;
    uint32_t held[4];
};

struct Thread {
    std::vector<Product> pending;
    unsigned commits;
    unsigned proxy_fences;      // so far
    unsigned seen_fences;       // of them before a barrier to which all came with one
    unsigned fences_at[16];     // before it came to a named barrier
    std::vector<Fragment> fenced;  // by the last fence
    bool fence_complete;           // so that the next array begins another
    std::map<const float*, std::vector<float>> sums;  // of products; in memory they are poison in flight
};

struct Step {
    bool across;
    uint64_t a_tile, b;
    int columns;
    double (*value)(uint16_t);
    explicit Step(const Product& p)
        : across(!p.a), a_tile(p.a_tile), b(p.b), columns(p.columns), value(p.value) {}
    bool operator==(const Step& o) const {
        return across == o.across && a_tile == o.a_tile && b == o.b && columns == o.columns && value == o.value;
    }
};

Thread threads_of_block[kWarps * kLanes];
int count = 0;                                    // threads of the block
std::vector<unsigned char> visible;               // shared memory as the async proxy sees it
std::vector<Step> steps[kWarps / kWarpsOfGroup];  // products of each warpgroup
size_t done[kWarps];                              // how many of them each warp has issued
unsigned products = 0;                            // of all warps and launches

Thread& mine() { return threads_of_block[thread()]; }

bool poisoned(const float* d, size_t n) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(d);
    return std::all_of(bytes, bytes + n * sizeof *d, [](unsigned char byte) { return byte == kPoison; });
}

struct Descriptor {
    uint32_t start, leading, stride, base, mode;
    explicit Descriptor(uint64_t bits)
        : start(bytes(bits)), leading(bytes(bits >> 16)), stride(bytes(bits >> 32)),
          base(static_cast<uint32_t>(bits >> 49 & 7)), mode(static_cast<uint32_t>(bits >> 62)) {}
    static uint32_t bytes(uint64_t field) { return static_cast<uint32_t>(field & 0x3fff) << 4; }
};

// 16 bytes of shared memory, or of what stands for it.
const unsigned char* chunk_at(const unsigned char* memory, uint32_t at) {
    if (at < kSharedStart || at + 16 > kSharedStart + shared_memory_bytes())
        fail("wgmma reads its tile at address %u, outside dynamic shared memory", at);
    return memory + (at - kSharedStart);
}

// What a descriptor names (PTX ISA, "Matrix Descriptor Format"): the k of each of `rows` together, or `across`.
Tile read_tile(const unsigned char* memory, uint64_t bits, int rows, bool across) {
    const Descriptor tile(bits);
    const uint32_t pitch = tile.mode ? 256u >> tile.mode : 16u;  // 128, 64 or 32 bytes of a row
    if (tile.base) fail("wgmma with base offset %u, which is not emulated", tile.base);
    if (tile.mode && tile.start % (8 * pitch) >= pitch)
        fail("wgmma on a swizzled tile from address %u, which is not in the first row of the pattern", tile.start);
    const auto swizzled = [&](uint32_t at) { return tile.mode ? at ^ (at >> 7 & (pitch / 16 - 1)) << 4 : at; };
    Tile values(static_cast<size_t>(rows) * 16);
    if (across) {
        if (tile.mode != 1 || tile.start % 128) fail("wgmma across k with another layout than is emulated");
        for (uint32_t k = 0; k < 16; ++k)
            for (uint32_t c = 0; c < static_cast<uint32_t>(rows) / 8; ++c) {
                const uint32_t at = tile.start + c / 8 * tile.leading + k / 8 * tile.stride + k % 8 * 128 + c % 8 * 16;
                uint16_t chunk[8];
                memcpy(chunk, chunk_at(memory, swizzled(at)), 16);
                for (uint32_t i = 0; i < 8; ++i) values[(c * 8 + i) * 16 + k] = chunk[i];
            }
        return values;
    }
    if (tile.mode && tile.start % pitch + 32 > pitch) fail("wgmma past the end of the rows of a swizzled tile");
    for (uint32_t n = 0; n < static_cast<uint32_t>(rows); ++n)
        for (uint32_t c = 0; c < 2; ++c) {
            const uint32_t at = tile.start + n / 8 * tile.stride + n % 8 * pitch + c * (tile.mode ? 16 : tile.leading);
            memcpy(&values[n * 16 + c * 8], chunk_at(memory, swizzled(at)), 16);
        }
    return values;
}

// Tile 0, A, or 1, B, of a product; empty where A is in registers.
Tile read_tile(const unsigned char* memory, const Product& product, int which) {
    if (product.a && which == 0) return {};
    return read_tile(memory, which ? product.b : product.a_tile, which ? product.columns : 64, !product.a);
}

const unsigned char* shared() { return static_cast<const unsigned char*>(shared_memory()); }

void combine_issue(void* const (&payload)[kLanes]) {
    need_all(payload, "wgmma");
    const Product& first = *static_cast<Product*>(payload[0]);
    const int warp = thread() / kLanes, group = warp / kWarpsOfGroup;
    if ((group + 1) * kWarpsOfGroup * kLanes > count) fail("wgmma by less than a warpgroup of 128 threads");
    const Step step(first);
    for (void* one : payload)
        if (!(step == Step(*static_cast<Product*>(one)))) fail("wgmma in which lanes of a warp differ");
    std::vector<Step>& all = steps[group];
    const size_t at = done[warp]++;
    if (at == all.size()) all.push_back(step);
    if (!(all[at] == step)) fail("wgmma in which warps of a warpgroup differ");
    for (int which = 0; which < 2; ++which) {
        const auto tile = std::make_shared<Tile>(read_tile(shared(), first, which));
        if (visible.empty() || *tile != read_tile(visible.data(), first, which))
            fail("wgmma on a tile that was written after the last barrier with fence_async_shared by all threads");
        for (void* one : payload) static_cast<Product*>(one)->tiles[which] = tile;
    }
    ++products;
}

// The sums of a warp, in the fragments of the PTX ISA ("Register Fragments for wgmma.mma_async.m64nNk16").
void land(Thread* const lanes, size_t index) {
    const Product& first = lanes[0].pending[index];
    const Tile &a_tile = *first.tiles[0], &b_tile = *first.tiles[1];
    std::vector<double> b(b_tile.size());
    for (size_t i = 0; i < b.size(); ++i) b[i] = first.value(b_tile[i]);
    float* sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane].sums[lanes[lane].pending[index].d].data();
    for (int row = 0; row < 16; ++row) {
        double a[16];
        for (int k = 0; k < 16; ++k) {
            const Product& holder = lanes[row % 8 * 4 + k % 8 / 2].pending[index];
            if (!first.a)
                a[k] = first.value(a_tile[static_cast<size_t>(thread() / kLanes % kWarpsOfGroup * 16 + row) * 16 + k]);
            else
                a[k] = first.value(static_cast<uint16_t>(holder.fragment[row / 8 + 2 * (k / 8)] >> k % 2 * 16));
        }
        for (int n = 0; n < first.columns; ++n) {
            float& d = sums[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
            d = tensor_core_sum(a, &b[static_cast<size_t>(n) * 16], 16, d);
        }
    }
}

void combine_wait(void* const (&payload)[kLanes]) {
    need_all(payload, "wgmma_wait");
    const unsigned pending = *static_cast<unsigned*>(payload[0]);
    Thread* const lanes = threads_of_block + thread() / kLanes * kLanes;
    for (int lane = 0; lane < kLanes; ++lane)
        if (*static_cast<unsigned*>(payload[lane]) != pending || lanes[lane].commits != lanes[0].commits ||
            lanes[lane].pending.size() != lanes[0].pending.size())
            fail("wgmma_wait for which lanes of a warp have different groups");
    size_t landed = 0;
    for (; landed < lanes[0].pending.size(); ++landed) {
        const Product& product = lanes[0].pending[landed];
        if (product.group + pending >= lanes[0].commits) break;
        for (int which = 0; which < 2; ++which)
            if (*product.tiles[which] != read_tile(shared(), product, which))
                fail("the tile of a wgmma was written before the wait for it");
        for (int lane = 0; lane < kLanes; ++lane) {
            const Product& one = lanes[lane].pending[landed];
            if (one.a && memcmp(one.a, one.fragment, sizeof one.fragment))
                fail("the registers of A of a wgmma were written before the wait for it");
            if (!poisoned(one.d, static_cast<size_t>(one.columns) / 2))
                fail("the sums of a wgmma were written before the wait for it");
        }
        land(lanes, landed);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        Thread& one = lanes[lane];
        const std::vector<Product> complete(one.pending.begin(), one.pending.begin() + static_cast<ptrdiff_t>(landed));
        one.pending.erase(one.pending.begin(), one.pending.begin() + static_cast<ptrdiff_t>(landed));
        for (const Product& product : complete) {
            const auto same = [&](const Product& other) { return other.d == product.d; };
            if (std::any_of(one.pending.begin(), one.pending.end(), same)) continue;
            const std::vector<float>& sums = one.sums[product.d];
            memcpy(product.d, sums.data(), sums.size() * sizeof(float));
        }
    }
}

}  // namespace

void start_of_block(int threads) {
    count = threads;
    visible.clear();
    for (int t = 0; t < threads; ++t) threads_of_block[t] = Thread{};
    for (auto& one : steps) one.clear();
    std::fill(std::begin(done), std::end(done), 0);
}

void end_of_barrier() {
    const auto fenced = [](const Thread& one) { return one.proxy_fences != one.seen_fences; };
    const bool all = std::all_of(threads_of_block, threads_of_block + count, fenced);
    for (int t = 0; t < count; ++t) threads_of_block[t].seen_fences = threads_of_block[t].proxy_fences;
    if (all) visible.assign(shared(), shared() + shared_memory_bytes());
}

void comes_to_named_barrier(int id) { mine().fences_at[id] = mine().proxy_fences; }

void end_of_named_barrier(int id) {
    const auto fenced = [&](const Thread& one) { return one.fences_at[id] != one.seen_fences; };
    if (!std::all_of(threads_of_block, threads_of_block + count, fenced)) return;
    for (int t = 0; t < count; ++t) threads_of_block[t].seen_fences = threads_of_block[t].fences_at[id];
    visible.assign(shared(), shared() + shared_memory_bytes());
}

void end_of_thread() {
    if (!mine().pending.empty()) fail("exits while a wgmma is in flight");
}

void end_of_block() {
    for (int warp = 0; warp < count / kLanes; ++warp)
        if (done[warp] != steps[warp / kWarpsOfGroup].size()) fail("wgmma in which a warp of a warpgroup took no part");
}

uint32_t shared_address(const void* pointer) {
    const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - shared();
    if (offset < 0 || offset > static_cast<ptrdiff_t>(shared_memory_bytes()))
        fail("shared_address of what is not in dynamic shared memory");
    return kSharedStart + static_cast<uint32_t>(offset);
}

void fence_array(const float* d, size_t n) {
    for (const Product& product : mine().pending)
        if (product.d == d) fail("wgmma_fence of sums in flight");
    mine().sums[d].assign(d, d + n);
}

void fence_array(const uint32_t* a) {
    Thread& one = mine();
    if (one.fence_complete) one.fenced.clear();
    one.fence_complete = false;
    one.fenced.push_back({a, {a[0], a[1], a[2], a[3]}});
}

void fence() {
    if (mine().fence_complete) mine().fenced.clear();
    mine().fence_complete = true;
}

void fence_proxy() { ++mine().proxy_fences; }

static void issue(Product product) {
    Thread& one = mine();
    const size_t n = static_cast<size_t>(product.columns) / 2;
    const auto same = [&](const Product& other) { return other.d == product.d; };
    if (std::any_of(one.pending.begin(), one.pending.end(), same)) {
        if (!poisoned(product.d, n)) fail("the sums of a wgmma were written before the wait for it");
    } else {
        const auto sums = one.sums.find(product.d);
        if (sums == one.sums.end() || sums->second.size() != n || memcmp(sums->second.data(), product.d, n * 4))
            fail("wgmma with sums that were written without a wgmma_fence");
        memset(product.d, kPoison, n * 4);
    }
    product.group = one.commits;
    collective(0xffffffffu, combine_issue, &product, "wgmma");
    one.pending.push_back(product);
}

void issue(float* d, int columns, const uint32_t* a, uint64_t b, double (*value)(uint16_t)) {
    const Thread& one = mine();
    const auto held = [&](const Fragment& f) { return f.a == a && !memcmp(f.held, a, sizeof f.held); };
    if (!one.fence_complete || std::none_of(one.fenced.begin(), one.fenced.end(), held))
        fail("wgmma with registers of A that were written after the last wgmma_fence");
    issue({d, columns, a, {a[0], a[1], a[2], a[3]}, 0, b, {}, value, 0});
}

void issue_across(float* d, int columns, uint64_t a, uint64_t b, double (*value)(uint16_t)) {
    issue({d, columns, nullptr, {}, a, b, {}, value, 0});
}

void commit() { ++mine().commits; }

void wait(int pending) {
    unsigned payload = static_cast<unsigned>(pending);
    collective(0xffffffffu, combine_wait, &payload, "wgmma_wait");
}

void results(const float* d) {
    for (const Product& product : mine().pending)
        if (product.d == d) fail("wgmma_results of sums in flight");
}

}  // namespace emulator

// For tests: products of warps since the last call.
extern "C" __attribute__((visibility("default"))) unsigned qnk_emulator_products() {
    return std::exchange(emulator::products, 0);
}
