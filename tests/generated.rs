//! The header that kernels include is what `wire` renders.

use railhop::wire::kernel::header;

#[test]
fn the_kernels_header_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/generated/wire.cuh");
    if std::env::var_os("UPDATE_GENERATED").is_some() {
        std::fs::write(path, header()).unwrap();
    }
    let there = std::fs::read_to_string(path).unwrap();
    assert!(there == header(), "run UPDATE_GENERATED=1 cargo test --test generated");
}
