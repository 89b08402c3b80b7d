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

struct Product {
    float* d;
    int columns;
    const uint32_t* a;
    uint32_t fragment[4];  // of A, when it was issued
    uint64_t b;
    std::shared_ptr<const std::vector<uint16_t>> tile;  // [columns, 16 of k], when it was issued
    double (*value)(uint16_t);
    unsigned group;  // commits of the thread before it
};

using Fragments16 = std::map<const uint32_t*, std::vector<uint32_t>>;  // of A, with what they held

struct Thread {
    std::vector<Product> pending;
    unsigned commits;
    bool proxy_fence;           // since the last barrier
    Fragments16 fenced, last_fence;  // of the fence that begins, and of the last
    std::map<const float*, std::vector<float>> sums;  // of products; in memory they are poison in flight
};

struct Step {
    uint64_t b;
    int columns;
    double (*value)(uint16_t);
    bool operator==(const Step& o) const { return b == o.b && columns == o.columns && value == o.value; }
};

Thread threads_of_block[kWarps * kLanes];
int count = 0;                                    // threads of the block
std::vector<unsigned char> visible;               // shared memory as the async proxy sees it
std::vector<Step> steps[kWarps / kWarpsOfGroup];  // products of each warpgroup
size_t done[kWarps];                              // how many of them each warp has issued

Thread& mine() { return threads_of_block[thread()]; }

bool poisoned(const float* d, size_t n) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(d);
    return std::all_of(bytes, bytes + n * sizeof *d, [](unsigned char byte) { return byte == kPoison; });
}

// What a descriptor names (PTX ISA, "Matrix Descriptor Format"), K-major, from `memory` in place of shared memory.
std::vector<uint16_t> read_tile(const unsigned char* memory, uint64_t b, int columns) {
    const uint32_t start = static_cast<uint32_t>(b & 0x3fff) << 4;
    const uint32_t leading = static_cast<uint32_t>(b >> 16 & 0x3fff) << 4;
    const uint32_t stride = static_cast<uint32_t>(b >> 32 & 0x3fff) << 4;
    const uint32_t base = static_cast<uint32_t>(b >> 49 & 7), mode = static_cast<uint32_t>(b >> 62);
    const uint32_t row = mode ? 256u >> mode : 16u;  // 128, 64 or 32 bytes of a column
    if (base) fail("wgmma with base offset %u, which is not emulated", base);
    if (mode && start % (8 * row) >= row)
        fail("wgmma on a swizzled tile from address %u, which is not in the first row of the pattern", start);
    if (mode && start % row + 32 > row) fail("wgmma past the end of the rows of a swizzled tile");
    std::vector<uint16_t> tile(static_cast<size_t>(columns) * 16);
    for (int n = 0; n < columns; ++n)
        for (uint32_t chunk = 0; chunk < 2; ++chunk) {
            uint32_t at = start + static_cast<uint32_t>(n) / 8 * stride + static_cast<uint32_t>(n) % 8 * row;
            at += chunk * (mode ? 16 : leading);
            if (mode) at ^= (at >> 7 & (row / 16 - 1)) << 4;
            if (at < kSharedStart || at + 16 > kSharedStart + shared_memory_bytes())
                fail("wgmma reads its tile at address %u, outside dynamic shared memory", at);
            memcpy(&tile[static_cast<size_t>(n) * 16 + chunk * 8], memory + (at - kSharedStart), 16);
        }
    return tile;
}

const unsigned char* shared() { return static_cast<const unsigned char*>(shared_memory()); }

void combine_issue(void* const (&payload)[kLanes]) {
    need_all(payload, "wgmma");
    const Product& first = *static_cast<Product*>(payload[0]);
    const int warp = thread() / kLanes, group = warp / kWarpsOfGroup;
    if ((group + 1) * kWarpsOfGroup * kLanes > count) fail("wgmma by less than a warpgroup of 128 threads");
    const Step step{first.b, first.columns, first.value};
    for (void* one : payload) {
        const Product& product = *static_cast<Product*>(one);
        if (!(step == Step{product.b, product.columns, product.value})) fail("wgmma in which lanes of a warp differ");
    }
    std::vector<Step>& all = steps[group];
    const size_t at = done[warp]++;
    if (at == all.size()) all.push_back(step);
    if (!(all[at] == step)) fail("wgmma in which warps of a warpgroup differ");
    auto tile = std::make_shared<std::vector<uint16_t>>(read_tile(shared(), first.b, first.columns));
    if (visible.empty() || *tile != read_tile(visible.data(), first.b, first.columns))
        fail("wgmma on a tile that was written after the last barrier with fence_async_shared by all threads");
    for (void* one : payload) static_cast<Product*>(one)->tile = tile;
}

// The sums of a warp, in the fragments of the PTX ISA ("Register Fragments for wgmma.mma_async.m64nNk16").
void land(Thread* const lanes, size_t index) {
    const Product& first = lanes[0].pending[index];
    std::vector<double> b(first.tile->size());
    for (size_t i = 0; i < b.size(); ++i) b[i] = first.value((*first.tile)[i]);
    for (int row = 0; row < 16; ++row) {
        double a[16];
        for (int k = 0; k < 16; ++k) {
            const Product& holder = lanes[row % 8 * 4 + k % 8 / 2].pending[index];
            a[k] = first.value(static_cast<uint16_t>(holder.fragment[row / 8 + 2 * (k / 8)] >> (k % 2 * 16)));
        }
        for (int n = 0; n < first.columns; ++n) {
            Thread& holder = lanes[row % 8 * 4 + n % 8 / 2];
            float& d = holder.sums[holder.pending[index].d][static_cast<size_t>(n / 8 * 4 + row / 8 * 2 + n % 2)];
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
        if (*product.tile != read_tile(shared(), product.b, product.columns))
            fail("the tile of a wgmma was written before the wait for it");
        for (int lane = 0; lane < kLanes; ++lane) {
            const Product& one = lanes[lane].pending[landed];
            if (memcmp(one.a, one.fragment, sizeof one.fragment))
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
    const auto fenced = [](const Thread& one) { return one.proxy_fence; };
    const bool all = std::all_of(threads_of_block, threads_of_block + count, fenced);
    for (int t = 0; t < count; ++t) threads_of_block[t].proxy_fence = false;
    if (all) visible.assign(shared(), shared() + shared_memory_bytes());
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

void fence_array(const uint32_t* a, size_t n) { mine().fenced[a].assign(a, a + n); }

void fence() { mine().last_fence = std::exchange(mine().fenced, {}); }

void fence_proxy() { mine().proxy_fence = true; }

void issue(float* d, int columns, const uint32_t* a, uint64_t b, double (*value)(uint16_t)) {
    Thread& one = mine();
    const size_t n = static_cast<size_t>(columns) / 2;
    const auto fragment = one.last_fence.find(a);
    if (fragment == one.last_fence.end() || memcmp(fragment->second.data(), a, 4 * sizeof *a))
        fail("wgmma with registers of A that were written after the last wgmma_fence");
    const auto same = [&](const Product& other) { return other.d == d; };
    if (std::any_of(one.pending.begin(), one.pending.end(), same)) {
        if (!poisoned(d, n)) fail("the sums of a wgmma were written before the wait for it");
    } else {
        const auto sums = one.sums.find(d);
        if (sums == one.sums.end() || sums->second.size() != n || memcmp(sums->second.data(), d, n * sizeof *d))
            fail("wgmma with sums that were written without a wgmma_fence");
        memset(d, kPoison, n * sizeof *d);
    }
    Product product{d, columns, a, {a[0], a[1], a[2], a[3]}, b, nullptr, value, one.commits};
    collective(0xffffffffu, combine_issue, &product, "wgmma");
    one.pending.push_back(product);
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
