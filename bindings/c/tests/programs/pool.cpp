// The layer from C++: handles that free themselves, threads of the caller's own, calls from several
// threads at once, and a layer from C's side of the test.
// usage: pool CHECKPOINT LAYER FOLDER TOKENS HIDDEN
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "moe_runner.h"

static void check(bool holds, const char *what) {
    if (!holds) {
        std::fprintf(stderr, "%s does not hold; last error: %s\n", what, moe_last_error());
        std::exit(1);
    }
}
#define CHECK(condition) check(condition, #condition)

struct Free {
    void operator()(moe_checkpoint *handle) const { moe_checkpoint_free(handle); }
    void operator()(moe_layer *handle) const { moe_layer_free(handle); }
};

static std::vector<float> read_file(const std::string &path, size_t len) {
    std::vector<float> values(len);
    std::ifstream file(path, std::ios::binary);
    file.read(reinterpret_cast<char *>(values.data()), len * sizeof(float));
    CHECK(file.good());
    return values;
}

// Three threads for each region: simple, and slow.
struct Threads {
    std::atomic<size_t> regions{0};
    bool lazy = false;

    static void run(void *context, size_t items, moe_task task, const void *work) {
        auto &self = *static_cast<Threads *>(context);
        self.regions++;
        std::atomic<size_t> next{0};
        std::vector<std::thread> threads;
        for (size_t worker = 0; worker < 3; worker++) {
            threads.emplace_back([&, worker] {
                for (size_t item; (item = next++) < items;) {
                    if (!self.lazy) {
                        task(work, item, worker);
                    }
                }
            });
        }
        for (auto &thread : threads) {
            thread.join();
        }
    }
};

int main(int argc, char **argv) {
    CHECK(argc == 6);
    const size_t index = std::stoul(argv[2]), tokens = std::stoul(argv[4]);
    const size_t hidden = std::stoul(argv[5]), len = tokens * hidden;
    const auto x = read_file(std::string(argv[3]) + "/x", len);

    moe_checkpoint *opened = nullptr;
    CHECK(moe_checkpoint_open(argv[1], &opened) == MOE_STATUS_OK);
    const std::unique_ptr<moe_checkpoint, Free> checkpoint(opened);

    const auto open = [&](const moe_options *options) {
        moe_layer *layer = nullptr;
        CHECK(moe_layer_open(checkpoint.get(), index, options, &layer) == MOE_STATUS_OK);
        return std::unique_ptr<moe_layer, Free>(layer);
    };
    const auto plain = open(nullptr);
    std::vector<float> want(len);
    CHECK(moe_layer_forward(plain.get(), x.data(), tokens, want.data()) == MOE_STATUS_OK);

    Threads threads;
    moe_thread_pool pool{&threads, 3, Threads::run};
    moe_options options{};
    options.size = sizeof options;
    options.pool = &pool;
    const auto own = open(&options);
    const size_t packing = threads.regions;
    CHECK(packing > 0);
    std::vector<float> got(len);
    CHECK(moe_layer_forward(own.get(), x.data(), tokens, got.data()) == MOE_STATUS_OK);
    CHECK(threads.regions > packing);
    // bit by bit, on whatever threads
    CHECK(std::memcmp(got.data(), want.data(), len * sizeof(float)) == 0);

    // one handle from several threads
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; caller++) {
        callers.emplace_back([&] {
            std::vector<float> mine(len);
            for (int i = 0; i < 5; i++) {
                CHECK(moe_layer_forward(plain.get(), x.data(), tokens, mine.data()) ==
                      MOE_STATUS_OK);
                CHECK(std::memcmp(mine.data(), want.data(), len * sizeof(float)) == 0);
            }
        });
    }
    for (auto &caller : callers) {
        caller.join();
    }

    // a pool that does not do its work is found out, and the handle says so ever after
    threads.lazy = true;
    CHECK(moe_layer_forward(own.get(), x.data(), tokens, got.data()) == MOE_STATUS_BUG);
    CHECK(std::strstr(moe_last_error(), "thread pool ran 0 of") != nullptr);
    threads.lazy = false;
    CHECK(moe_layer_forward(own.get(), x.data(), tokens, got.data()) == MOE_STATUS_ARGUMENT);
    CHECK(std::strstr(moe_last_error(), "ended in a bug") != nullptr);

    pool.threads = 0;
    moe_layer *none = nullptr;
    CHECK(moe_layer_open(checkpoint.get(), index, &options, &none) == MOE_STATUS_ARGUMENT);
    std::puts("ok");
}
