//! Many short parallel pieces in a row, between which no thread falls asleep.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::Yield;

/// Runs `f` on a thread of rayon's pool, whose other threads look for its pieces until it is done. A token takes
/// hundreds of products of some microseconds each: to wake a thread for one takes longer than its share of the work.
/// Who looks gives way to other programs.
pub(super) fn awake<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let done = AtomicBool::new(false);
    rayon::scope(|scope| {
        let (own, done) = (rayon::current_thread_index(), &done);
        let _done = Done(done);
        scope.spawn_broadcast(move |_, context| {
            // The thread of `f` may come by here, too, while it waits for a piece.
            let looks = Some(context.index()) != own;
            while looks && !done.load(Ordering::Relaxed) {
                if rayon::yield_now() != Some(Yield::Executed) {
                    std::thread::yield_now();
                }
            }
        });
        f()
    })
}
