/* A team of threads that stays in one parallel region and does one stage of work after the other.
 *
 * Opening a region wakes and joins threads, which costs as much as a short stage itself; a team waits between stages by looking at a
 * counter. Invariant: every member runs through the same stages, and none begins a stage before all have ended the one before.
 */
#ifndef DEEPSEEK_TEAM_H
#define DEEPSEEK_TEAM_H

#include <sched.h>
#include <stdatomic.h>

#include "native.h"

/* Looks at the counter before a waiting thread lets others have its processor: some 20 us, longer than a stage's ends lie apart. */
#define LOOKS 1000

struct team {
    _Alignas(64) atomic_llong next;
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_uint stage;
};

/* Runs member(context, team, thread, threads) on every thread of a region; `threads` is how many there really are. */
typedef void (*native_member)(void *context, struct team *team, int thread, int threads);
void native_team(native_member member, void *context, int threads);

INLINE void rest_a_little(void) {
#if defined(HAS_X86_KERNELS)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The stage ends when all members are here. */
static inline void end_stage(struct team *team, int threads) {
    if (threads < 2) {
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        return;
    }
    unsigned stage = atomic_load_explicit(&team->stage, memory_order_acquire);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        atomic_store_explicit(&team->stage, stage + 1, memory_order_release);
        return;
    }
    for (int looks = 0; atomic_load_explicit(&team->stage, memory_order_acquire) == stage; looks++) {
        if (looks < LOOKS)
            rest_a_little();
        else
            sched_yield();
    }
}

/* The indices of a stage that a member takes: first its own number, so that it knows early what it will read, then whatever is left. */
#define CLAIM_INDEX (threads + atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed))
#define SHARE_STAGE(index, count) \
    for (int64_t index = thread, count_of_stage = (count); index < count_of_stage; index = CLAIM_INDEX)

/* The same, one ahead: `after` is what the member takes next, so that what that begins with can be fetched; none from the count on. */
#define SHARE_STAGE_AHEAD(index, after, count) \
    for (int64_t index = thread, count_of_stage = (count), after = CLAIM_INDEX; index < count_of_stage; index = after, after = CLAIM_INDEX)

#endif
