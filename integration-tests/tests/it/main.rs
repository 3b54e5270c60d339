//! The patched host with a real model: one binary, since each links the whole host.

mod answers;
mod bed;
mod cache;
mod clients;
mod faults;
mod hostile;
mod isolation;
mod options;
mod quality;
mod refusals;
mod refusals_api;
mod server;
mod telemetry;
mod together;
mod toy;
mod untouched;
mod ways_in;

use std::sync::Once;

/// Backends are registered once per process.
fn register() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        ott_backend::register().expect("the name is free");
        let toys = [
            mistralrs_kv_backend::toy::provider(),
            mistralrs_kv_backend::toy::faulty::provider(),
        ];
        for toy in toys {
            mistralrs_kv_backend::register(toy).expect("the name is free");
        }
    });
}

/// Tests run one after the other: each fills both cores.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    register();
    ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A runtime for one test.
fn block_on<T>(future: impl std::future::Future<Output = T>) -> T {
    tokio::runtime::Runtime::new()
        .expect("a runtime starts")
        .block_on(future)
}
