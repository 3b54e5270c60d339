//! The real engine with a real model, for the tests, the demo, the benchmark and the evaluation.

pub mod bed;
pub mod engine;
pub mod model;
pub mod plot;
pub mod report;
pub mod request;
pub mod server;
